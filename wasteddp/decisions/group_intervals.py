"""The groups of a split's samples (sites, cameras, sessions, objects), and intervals over them.

Images of one group resemble each other, so intervals over images are too narrow: whole groups are resampled.

Legend: N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.decisions.binomial import F64, bootstrap_intervals, wilson_interval

FEW_GROUPS = 20  # with fewer, a cluster bootstrap is too narrow: Cameron, Gelbach and Miller 2008, REStat 90:414
_MOST_DRAWN = 10_000_000  # samples in all resamplings

I64 = npt.NDArray[np.int64]
Ends = tuple[float, float]


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
        lambda rows: np.array([counted_N[rows].mean()]), len(counted_N), groups=groups_N, draws=_draws(len(counted_N))
    )
    return _known(float(counted_N.mean()), len(np.unique(groups_N)), (float(low[0]), float(high[0])))


def _known(share: float, num_groups: int, ends: Ends) -> Ends:
    """Return the interval of a share. All draws of 0 or 1 are the same: then it is Wilson's of the number of groups.

    NaN if only one group has what is counted.
    """
    if share in (0.0, 1.0):
        return wilson_interval(share * num_groups, num_groups)
    return ends if num_groups > 1 else (float("nan"), float("nan"))


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

    low, high = bootstrap_intervals(statistics, len(truth), groups=groups_N, draws=_draws(len(truth)))
    numbers_N = np.asarray(groups_N)
    counted = [np.ones(len(truth), np.bool_), *(which == k for which in (truth, guess) for k in range(num_classes))]
    ends = [
        _known(float(is_right[rows].mean()) if rows.any() else float("nan"), len(np.unique(numbers_N[rows])), one)
        for rows, one in zip(counted, zip(low.tolist(), high.tolist(), strict=True), strict=True)
    ]
    return ClassIntervals(ends[0], tuple(ends[1 : num_classes + 1]), tuple(ends[num_classes + 1 :]))


def _draws(num_samples: int) -> int:
    return min(1000, max(100, _MOST_DRAWN // num_samples))


def _plain(ends: Ends) -> list[float] | None:
    return None if ends[0] != ends[0] else list(ends)
