"""Metrics of a confusion matrix: accuracy with its interval, precision, recall, F1. Pure numpy.

Legend: K classes, N samples. A confusion matrix is int64 [K, K]: rows are true classes, columns are predicted ones.

0 / 0 (the precision of a class that was never predicted, the recall of one that never occurred) is NaN here and null in
JSON. It is unknown, neither 0 nor 1, and averages leave it out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isnan, nan
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.decisions.intervals import wilson_interval

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """One class against the rest. All except `support` are in 0..1, or NaN if undefined."""

    precision: float
    recall: float
    f1: float
    support: int  # samples whose true class this is


@dataclass(frozen=True, slots=True)
class Metrics:
    """The metrics of a confusion matrix. All except counts are in 0..1, or NaN if undefined."""

    num_samples: int
    num_correct: int
    accuracy: float
    accuracy_low: float  # 95 % interval
    accuracy_high: float
    macro_f1: float
    macro_recall: float  # also called balanced accuracy
    per_class: tuple[ClassMetrics, ...]  # [K]

    @property
    def averaged(self) -> str:
        """Over how many classes the macro averages are: "6 classes", or "5 of 6 classes" if one has no samples."""
        num_classes, num_with = len(self.per_class), sum(one.support > 0 for one in self.per_class)
        return f"{num_with} of {num_classes} classes" if num_with < num_classes else f"{num_classes} classes"

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as plain values. NaN becomes None, because JSON does not have NaN."""
        return {key: _jsonable(value) for key, value in asdict(self).items()}


def confusion_matrix(labels: npt.ArrayLike, predictions: npt.ArrayLike, num_classes: int) -> I64:
    """Count the pairs (true, predicted): int64 [K, K]."""
    pairs = np.asarray(labels, dtype=np.int64) * num_classes + np.asarray(predictions, dtype=np.int64)
    # [N] numbers below K * K -> counts [K * K] -> rows true, columns predicted
    return np.bincount(pairs, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


def summarise(confusion: npt.ArrayLike) -> Metrics:
    """Return all metrics of a confusion matrix [K, K].

    Macro averages are means of F1 and recall over the classes with support. Of the two definitions of macro F1, this is
    the one that Opitz and Burst 2019 (arXiv:1911.03347) recommend. Balanced accuracy: Brodersen et al. 2010.
    """
    matrix = np.asarray(confusion, dtype=np.int64)
    hits, true, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    per_class = tuple(
        # F1, the harmonic mean of precision and recall, is 2 TP / (2 TP + FP + FN)
        ClassMetrics(_ratio(h, p), _ratio(h, t), _ratio(2 * h, t + p), t)
        for h, t, p in zip(hits.tolist(), true.tolist(), predicted.tolist(), strict=True)
    )
    occurring = [one for one in per_class if one.support]
    num_samples, num_correct = int(matrix.sum()), int(hits.sum())
    low, high = wilson_interval(num_correct, num_samples)
    return Metrics(
        num_samples=num_samples,
        num_correct=num_correct,
        accuracy=_ratio(num_correct, num_samples),
        accuracy_low=low,
        accuracy_high=high,
        macro_f1=_ratio(sum(one.f1 for one in occurring), len(occurring)),
        macro_recall=_ratio(sum(one.recall for one in occurring), len(occurring)),
        per_class=per_class,
    )


def percent(share: float) -> str:
    """Format a share: 0.9312 -> "93.1 %", NaN -> "-"."""
    return "-" if share != share else f"{100 * share:.1f} %"


def as_float(probability: np.float32) -> float:
    """Return the shortest decimal number that rounds to this float32: 0.1, not 0.10000000149011612."""
    return float(str(probability))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else nan


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return None if isnan(value) else value
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    return [_jsonable(inner) for inner in value] if isinstance(value, (list, tuple)) else value
