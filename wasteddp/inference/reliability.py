"""The calibration of a model's confidence on a split, and the model's mistakes. Pure numpy.

Legend: M samples of one process, K classes.

The results of several processes are merged without sending the predictions of all samples: counts are summed, and each
process sends only its worst mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.inference.metrics import F32, I64, Metrics, as_float

BINS = (
    10  # of confidence, of equal width; waste sets have a few hundred images, which would leave more bins nearly empty
)
MISTAKES_LISTED = 20


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
    """Predictions by confidence, in `BINS` equal parts of 0..1; the last part includes 1. Each field is [BINS]."""

    counts: tuple[int, ...]
    correct: tuple[int, ...]
    confidence_sums: tuple[float, ...]

    @classmethod
    def measure(cls, answers: Answers) -> Reliability:
        confidence = answers.confidence.astype(np.float64)
        bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        right = answers.predicted == answers.labels
        return cls(
            tuple(np.bincount(bins, minlength=BINS).tolist()),
            tuple(np.bincount(bins[right], minlength=BINS).tolist()),
            tuple(np.bincount(bins, weights=confidence, minlength=BINS).tolist()),
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
                    "from": number / BINS,
                    "to": (number + 1) / BINS,
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
