"""Exact bounds of a binomial share, and intervals by resampling. Pure numpy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import exp, log, log1p, nan, sqrt

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

_Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_STEPS = 50  # of a bisection: as exact as the sums
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


def lower_bound(successes: int, trials: int, error: float) -> float:
    """Return the one-sided lower bound of the share: it is too high with a probability of at most `error`."""
    return 1.0 - upper_bound(trials - successes, trials, error)


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
