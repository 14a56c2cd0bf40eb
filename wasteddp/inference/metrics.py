"""Metrics of a confusion matrix, the calibration of a model's confidence, and the model's mistakes. Pure numpy.

Legend: K classes, N samples, M samples of one process. A confusion matrix is int64 [K, K]: rows are true classes,
columns are predicted ones.

0 / 0 (the precision of a class that was never predicted, the recall of one that never occurred) is NaN here and null in
JSON. It is unknown, neither 0 nor 1, and averages leave it out.

The results of several processes are merged without sending the predictions of all samples: counts are summed, and each
process sends only its worst mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import isnan, nan
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.decisions.intervals import wilson_interval

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

CONFIDENCE_BINS = 10  # of equal width; waste sets have a few hundred images, which would leave more bins nearly empty
MISTAKES_LISTED = 20


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


@dataclass(frozen=True, slots=True)
class Answers:
    """M predictions in any order. `samples` are their numbers in the split."""

    samples: I64
    labels: I64
    predicted: I64
    confidence: F32  # probability of the predicted class
    of_truth: F32  # probability of the true class

    @classmethod
    def from_probabilities(cls, labels: npt.ArrayLike, probabilities_MK: F32) -> Answers:
        """Return the answers for a whole split in its order."""
        rows, truth = np.arange(len(probabilities_MK)), np.asarray(labels, np.int64)
        predicted = probabilities_MK.argmax(axis=1)
        return cls(rows, truth, predicted, probabilities_MK[rows, predicted], probabilities_MK[rows, truth])


@dataclass(frozen=True, slots=True)
class Mistake:
    """A wrong prediction."""

    sample: int
    true: int
    predicted: int
    confidence: float
    of_truth: float


@dataclass(frozen=True, slots=True)
class Mistakes:
    """Up to `MISTAKES_LISTED` of each kind, the worst first."""

    surest: tuple[Mistake, ...]  # by the confidence in the wrong class; wrong labels are found here
    worst: tuple[Mistake, ...]  # by the probability of the true class: those with the largest loss

    @classmethod
    def find(cls, answers: Answers) -> Mistakes:
        wrong = np.flatnonzero(answers.predicted != answers.labels)
        # ties are ordered by sample number, so that the order is the same on any number of processes
        surest = wrong[np.lexsort((answers.samples[wrong], -answers.confidence[wrong]))]
        worst = wrong[np.lexsort((answers.samples[wrong], answers.of_truth[wrong]))]
        return cls(_taken(answers, surest[:MISTAKES_LISTED]), _taken(answers, worst[:MISTAKES_LISTED]))

    @classmethod
    def merge(cls, parts: Iterable[Mistakes]) -> Mistakes:
        """Merge the mistakes of all processes."""
        parts = list(parts)
        surest = sorted((m for part in parts for m in part.surest), key=lambda m: (-m.confidence, m.sample))
        worst = sorted((m for part in parts for m in part.worst), key=lambda m: (m.of_truth, m.sample))
        return cls(tuple(surest[:MISTAKES_LISTED]), tuple(worst[:MISTAKES_LISTED]))


@dataclass(frozen=True, slots=True)
class Reliability:
    """Predictions by confidence, in equal parts of 0..1; the last part includes 1. Each field is [CONFIDENCE_BINS]."""

    counts: tuple[int, ...]
    correct: tuple[int, ...]
    confidence_sums: tuple[float, ...]

    @classmethod
    def measure(cls, answers: Answers) -> Reliability:
        confidence = answers.confidence.astype(np.float64)
        bins = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
        right = answers.predicted == answers.labels
        return cls(
            tuple(np.bincount(bins, minlength=CONFIDENCE_BINS).tolist()),
            tuple(np.bincount(bins[right], minlength=CONFIDENCE_BINS).tolist()),
            tuple(np.bincount(bins, weights=confidence, minlength=CONFIDENCE_BINS).tolist()),
        )

    @classmethod
    def merge(cls, parts: Iterable[Reliability]) -> Reliability:
        """Add up the counts of all processes."""
        parts = list(parts)
        return cls(
            tuple(map(sum, zip(*(part.counts for part in parts), strict=True))),
            tuple(map(sum, zip(*(part.correct for part in parts), strict=True))),
            tuple(map(sum, zip(*(part.confidence_sums for part in parts), strict=True))),
        )

    @property
    def calibration_error(self) -> float:
        """Mean distance of a bin's accuracy from its mean confidence, weighted by samples. 0 is perfect; NaN if empty.

        Source: Guo et al. 2017 (arXiv:1706.04599), expected calibration error, eq. 3.
        """
        total = sum(self.counts)
        gaps = (abs(right - sure) for right, sure in zip(self.correct, self.confidence_sums, strict=True))
        return sum(gaps) / total if total else float("nan")

    def to_json(self) -> dict[str, Any]:
        bins = zip(self.counts, self.correct, self.confidence_sums, strict=True)
        return {
            "expected_calibration_error": self.calibration_error if sum(self.counts) else None,
            "bins": [
                {
                    "from": number / CONFIDENCE_BINS,
                    "to": (number + 1) / CONFIDENCE_BINS,
                    "count": count,
                    "correct": right,
                    "mean_confidence": sure / count if count else None,
                }
                for number, (count, right, sure) in enumerate(bins)
            ],
        }


@dataclass(frozen=True, slots=True)
class Seen:
    """The metrics of a model on one split. K classes."""

    split: str
    classes: tuple[str, ...]
    confusion: I64  # [K, K], rows true
    metrics: Metrics
    reliability: Reliability
    mistakes: Mistakes
    labels_N: I64 | None = None  # in the order of the split, with their probabilities; None: too many to keep
    probabilities_NK: F32 | None = None


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else nan


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return None if isnan(value) else value
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    return [_jsonable(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _taken(answers: Answers, rows: I64) -> tuple[Mistake, ...]:
    return tuple(
        Mistake(
            int(answers.samples[row]),
            int(answers.labels[row]),
            int(answers.predicted[row]),
            as_float(answers.confidence[row]),
            as_float(answers.of_truth[row]),
        )
        for row in rows
    )
