"""Exact bounds of a binomial share, and intervals by resampling, also over groups of samples. Pure numpy.

Groups are sites, cameras, sessions or objects. Images of one group resemble each other, so intervals over images are
too narrow: whole groups are resampled.

Legend: N samples, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, log, log1p, nan, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Ends = tuple[float, float]

FEW_GROUPS = 20  # with fewer, a cluster bootstrap is too narrow: Cameron, Gelbach and Miller 2008, REStat 90:414
_Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_STEPS = 50  # of a bisection: as exact as the sums
_MOST_DRAWN = 10_000_000  # samples in all resamplings
_log_factorial: F64 = np.zeros(1)  # grows


def tail(successes: int, trials: int, share: float) -> float:
    """Return P(X <= successes) of X ~ Binomial(trials, share)."""
    return _tail(_log_choose(successes, trials), successes, trials, share)


def upper_bound(successes: int, trials: int, error: float) -> float:
    """Return the one-sided upper bound of the share: it is too low with a probability of at most `error`.

    Source: Clopper and Pearson 1934, Biometrika 26:404. 1 without trials.
    """
    if successes >= trials:
        return 1.0
    logs = _log_choose(successes, trials)
    low, high = successes / trials, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(logs, successes, trials, middle) >= error else (low, middle)
    return high


def wilson_interval(num_correct: float, num_samples: float, *, z: float = _Z_95) -> tuple[float, float]:
    """Return the score interval of a proportion, by default of 95 %; (NaN, NaN) without samples.

    The interval is always inside 0..1. It is also valid for few samples and proportions near 1, where
    p +- z sqrt(p (1 - p) / n) is too narrow: 10 of 10 gives 0.72 to 1, not 1 to 1.

    Source: Wilson 1927, JASA 22:209; recommended over the usual one by Brown, Cai and DasGupta 2001, Stat. Sci. 16:101.
    """
    if num_samples == 0:
        return nan, nan
    share, n = num_correct / num_samples, num_samples
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At 0 and n the bound is exactly 0 or 1; floating point would give -1e-17.
    return (0.0 if num_correct == 0 else centre - half), (1.0 if num_correct == n else centre + half)


def bootstrap_interval(
    statistic: Callable[[npt.NDArray[np.int64]], float],
    num_samples: int,
    *,
    groups: npt.ArrayLike | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic; see `bootstrap_intervals`."""
    low, high = bootstrap_intervals(
        lambda rows: np.array([statistic(rows)]), num_samples, groups=groups, draws=draws, seed=seed
    )
    return float(low[0]), float(high[0])


def bootstrap_intervals(
    statistics: Callable[[npt.NDArray[np.int64]], F64],
    num_samples: int,
    *,
    groups: npt.ArrayLike | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[F64, F64]:
    """Return the 95 % percentile intervals of M statistics: their lower and upper ends, float64 [M] each.

    NaN results are left out; an end is NaN if a statistic has no other results.

    Args:
        statistics: a function of sample numbers, int64, with repetitions; returns float64 [M].
        groups: [N], whole groups are drawn (cluster bootstrap: Field and Welsh 2007, JRSS B 69:369); None: samples are.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap.
    """
    rng = np.random.default_rng(seed)
    if groups is None:
        resampled = (rng.integers(0, num_samples, num_samples) for _ in range(draws))
    else:
        _, number = np.unique(np.asarray(groups), return_inverse=True)
        order = np.argsort(number, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(number))[:-1])
        count = len(members)
        resampled = (np.concatenate([members[i] for i in rng.integers(0, count, count)]) for _ in range(draws))
    found = np.stack([statistics(rows) for rows in resampled])  # [draws, M]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice encountered")
        low, high = np.nanquantile(found, [0.025, 0.975], axis=0)
    return low, high


def draws_for(num_samples: int) -> int:
    """Return the number of resamplings of a bootstrap: 1000, and fewer of many samples, at least 100."""
    return min(1000, max(100, _MOST_DRAWN // num_samples))


@dataclass(frozen=True, slots=True, eq=False)
class SampleGroups:
    """The group of each sample of a split."""

    rule: str  # how they were found, such as "column site"
    numbers_N: npt.NDArray[np.int32]

    @property
    def num_groups(self) -> int:
        return len(np.unique(self.numbers_N))

    @property
    def to_resample(self) -> npt.NDArray[np.int32] | None:
        """The group of each sample, int32 [N]; None if they are fewer than two, which give no interval."""
        return self.numbers_N if self.num_groups > 1 else None

    def to_json(self) -> dict[str, Any]:
        return {"rule": self.rule, "num_groups": self.num_groups}


def describe_groups(groups: Mapping[str, Any] | None) -> str:
    """Return a sentence on the intervals of a split with these groups (as `SampleGroups.to_json`); "": it has none."""
    if groups is None:
        return ""
    number, rule = groups["num_groups"], groups["rule"]
    if number < 2:
        return f"all images are of one group ({rule}), so the intervals are over images, and too narrow"
    few = f"; fewer than {FEW_GROUPS} groups make them too narrow" if number < FEW_GROUPS else ""
    return f"the intervals are over {number:,} groups ({rule}), by cluster bootstrap{few}"


def share_interval(is_counted_N: npt.ArrayLike, groups_N: npt.ArrayLike) -> Ends:
    """Return the 95 % interval over groups of the share of the samples that are counted; NaN without samples."""
    counted_N = np.asarray(is_counted_N, np.float64)
    if not len(counted_N):
        return float("nan"), float("nan")
    low, high = bootstrap_intervals(
        lambda rows: np.array([counted_N[rows].mean()]),
        len(counted_N),
        groups=groups_N,
        draws=draws_for(len(counted_N)),
    )
    return _known(float(counted_N.mean()), len(np.unique(groups_N)), (float(low[0]), float(high[0])))


@dataclass(frozen=True, slots=True)
class ClassIntervals:
    """95 % intervals over groups. NaN where the images of a class, or those predicted as it, are of fewer than two."""

    accuracy: Ends
    recall: tuple[Ends, ...]  # [K]
    precision: tuple[Ends, ...]  # [K]

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": list(self.accuracy),
            "recall": [_plain(ends) for ends in self.recall],
            "precision": [_plain(ends) for ends in self.precision],
        }


def class_intervals(
    labels: npt.ArrayLike, predicted: npt.ArrayLike, groups_N: npt.ArrayLike, *, num_classes: int
) -> ClassIntervals:
    """Return the intervals of accuracy, and of each class's recall and precision, by resampling groups.

    Args:
        labels, predicted: int [N], N at least 1.
    """
    truth, guess = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    is_right = truth == guess

    def statistics(rows: I64) -> F64:
        right = is_right[rows]
        hits = np.bincount(truth[rows][right], minlength=num_classes)
        true = np.bincount(truth[rows], minlength=num_classes)
        found = np.bincount(guess[rows], minlength=num_classes)
        with np.errstate(invalid="ignore"):
            return np.concatenate([[right.mean()], hits / true, hits / found])

    low, high = bootstrap_intervals(statistics, len(truth), groups=groups_N, draws=draws_for(len(truth)))
    numbers_N = np.asarray(groups_N)
    counted = [np.ones(len(truth), np.bool_), *(which == k for which in (truth, guess) for k in range(num_classes))]
    ends = [
        _known(float(is_right[rows].mean()) if rows.any() else float("nan"), len(np.unique(numbers_N[rows])), one)
        for rows, one in zip(counted, zip(low.tolist(), high.tolist(), strict=True), strict=True)
    ]
    return ClassIntervals(ends[0], tuple(ends[1 : num_classes + 1]), tuple(ends[num_classes + 1 :]))


def _known(share: float, num_groups: int, ends: Ends) -> Ends:
    """Return the interval of a share. All draws of 0 or 1 are the same: then it is Wilson's of the number of groups.

    NaN if only one group has what is counted.
    """
    if share in (0.0, 1.0):
        return wilson_interval(share * num_groups, num_groups)
    return ends if num_groups > 1 else (float("nan"), float("nan"))


def _tail(log_choose: F64, successes: int, trials: int, share: float) -> float:
    if successes >= trials or share <= 0:
        return 1.0
    if successes < 0 or share >= 1:
        return 0.0
    k = np.arange(successes + 1)
    terms = log_choose + k * log(share) + (trials - k) * log1p(-share)
    top = float(terms.max())
    return min(1.0, exp(top) * float(np.exp(terms - top).sum()))


def _log_choose(successes: int, trials: int) -> F64:
    """Return log(trials choose k) for k = 0 .. successes."""
    global _log_factorial
    if trials >= len(_log_factorial):
        _log_factorial = np.r_[0.0, np.cumsum(np.log(np.arange(1, 2 * trials + 2)))]
    k = np.arange(max(0, successes + 1))
    return np.asarray(_log_factorial[trials] - _log_factorial[k] - _log_factorial[np.maximum(0, trials - k)])


def _plain(ends: Ends) -> list[float] | None:
    return None if ends[0] != ends[0] else list(ends)
