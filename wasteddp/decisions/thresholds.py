"""Thresholds with guarantees: a bound on the error of what is decided alone, and a floor on the recall of a hazard.

Whether a threshold promises something, and whether it held, has the same words on every output.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wasteddp.decisions.intervals import F64, tail, upper_bound
from wasteddp.errors import DecisionError

_MOST_SAMPLES = 10**7
_STARTS = 5  # sequences of tests
_COVERAGES = 100
Outcome = Literal["held", "chance", "broken"]


@dataclass(frozen=True, slots=True)
class ErrorThreshold:
    """Items whose confidence is at least `threshold` are decided alone. Their error is at most `max_error` with
    probability `confidence` over the choice of the samples that it was chosen on."""

    threshold: float
    max_error: float
    confidence: float
    bound: float  # upper bound of the error, at most max_error
    num_samples: int
    num_decided: int
    num_wrong: int


@dataclass(frozen=True, slots=True)
class RecallThreshold:
    """An item whose probability of the hazard is at least `threshold` goes into its bin, or to a person if it may be a
    hazard of another bin too. The share of the hazard that does is at least `recall` with probability `confidence` over
    the choice of the samples that it was chosen on."""

    threshold: float
    recall: float
    confidence: float
    num_hazards: int
    num_missed: int


def choose_error_threshold(
    confidence: npt.ArrayLike, is_right: npt.ArrayLike, *, max_error: float, level: float = 0.95
) -> ErrorThreshold:
    """Choose the threshold that decides as many items alone as the bound allows.

    It tries coverages of 1 %, 2 %, ... of the items in `_STARTS` sequences. Each begins at another coverage and ends at
    the first whose bound is above `max_error`, so the sequences share 1 - level, and the coverages of one do not.

    Args:
        confidence: [N], of the decision for each sample. -inf: it is never decided alone.
        is_right: bool [N], whether the decision is right.
        max_error: share of wrong decisions among those made alone.
        level: probability that the guarantee holds.

    Source: selective classification with a guarantee: Geifman and El-Yaniv 2017 (arXiv:1705.08500). Their binary search
    takes the wrong half where few samples are the reason for a high bound; testing in a fixed sequence from several
    starts does not: Angelopoulos et al. 2021, Learn then Test (arXiv:2110.01052). The bound is Clopper and Pearson's.

    Raises:
        DecisionError: no threshold has the guarantee; the message has the number of images that would.
    """
    scores, right = np.asarray(confidence, np.float64), np.asarray(is_right, np.bool_)
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    wrong: npt.NDArray[np.int64] = np.cumsum(~right[order], dtype=np.int64)
    num_eligible = int(np.isfinite(scores).sum())
    # the last sample of each coverage, and all samples that tie with it, which are decided together
    ranks = np.ceil(num_eligible * np.arange(1, _COVERAGES + 1) / _COVERAGES).astype(np.int64)
    ends = np.searchsorted(-scores[:num_eligible], -scores[ranks - 1], side="right") - 1 if num_eligible else ranks[:0]
    error, best = (1 - level) / _STARTS, -1
    for start in range(_STARTS):
        first = (start + 1) * len(ends) // _STARTS - 1
        for end in ends[max(first, 0) :].tolist():
            if tail(int(wrong[end]), end + 1, max_error) > error:  # the bound is above max_error
                break
            best = max(best, end)
    if best < 0:
        raise _no_guarantee(wrong, ends, max_error, level, error)
    bound = upper_bound(int(wrong[best]), best + 1, error)
    return ErrorThreshold(float(scores[best]), max_error, level, bound, len(scores), best + 1, int(wrong[best]))


def choose_recall_threshold(
    probability: npt.ArrayLike, *, recall: float, level: float, name: str = "the hazard"
) -> RecallThreshold:
    """Choose the highest threshold whose recall has the floor.

    The number of missed samples that it allows depends on N alone: the largest m with P(Binomial(N, 1 - recall) <= m)
    at most 1 - level. The threshold is the (m + 1)-th smallest probability, so the guarantee is exact (an order
    statistic: Wilks 1941, Ann. Math. Stat. 12:91).

    Args:
        probability: [N], of the hazard, for the samples that are the hazard.

    Raises:
        DecisionError: N is too small; the message has the number that would do.
    """
    scores = np.sort(np.asarray(probability, np.float64))
    missed = -1
    while missed + 1 < len(scores) and tail(missed + 1, len(scores), 1 - recall) <= 1 - level:
        missed += 1
    if missed < 0:
        needed = ceil(log(1 - level) / log(recall))
        raise DecisionError(
            f"{name} has {len(scores)} images to choose a threshold on, and a recall of {recall:g} with confidence "
            f"{level:g} needs at least {needed}",
            "no threshold can be promised to find that share of it",
            f"add {needed - len(scores)} images of it to the split, or lower `recall` or `confidence`",
        )
    return RecallThreshold(float(scores[missed]), recall, level, len(scores), missed)


def risk_coverage(confidence: npt.ArrayLike, is_right: npt.ArrayLike) -> tuple[F64, F64, float]:
    """Return coverage [N], the error among the most confident samples [N], and the mean of that error (AURC).

    Samples that tie share their errors, so the curve does not depend on their order: a float32 softmax gives many of
    them exactly 1.

    Source: Geifman, Uziel and El-Yaniv 2019 (arXiv:1805.08206).
    """
    scores, right = np.asarray(confidence, np.float64), np.asarray(is_right, np.bool_)
    counts = np.arange(1, len(scores) + 1)
    order = np.argsort(-scores, kind="stable")
    _, tie = np.unique(-scores[order], return_inverse=True)
    errors = np.bincount(tie, ~right[order]) / np.bincount(tie)
    risk = np.cumsum(errors[tie]) / counts
    return counts / max(1, len(scores)), risk, float(risk.mean()) if len(scores) else float("nan")


def is_promised(record: Mapping[str, Any]) -> bool:
    """Whether the thresholds of decisions.json have guarantees: they were chosen on images that have no groups.

    Images of one group resemble each other, so there are fewer independent ones than the bounds count. A record that
    does not have the groups of the images that the thresholds were chosen on is of the same set: those measured on.
    """
    return record.get("chosen_groups", record["groups"]) is None


def outcome(value: float, limit: float, interval: Sequence[float] | None, *, at_most: bool) -> Outcome:
    """Return whether a limit was kept, or was not and chance may be the reason, or was not in spite of chance."""
    if value <= limit if at_most else value >= limit:
        return "held"
    if not interval or interval[0] <= limit <= interval[1]:
        return "chance"
    return "broken"


def in_words(found: Outcome, *, promised: bool) -> str:
    """Return what happened to a promise or an aim, to follow "the promise" or "the aim"."""
    if found == "held":
        return "held here" if promised else "was reached here"
    missed = "was not kept here" if promised else "was not reached here"
    return missed + (", perhaps by chance" if found == "chance" else ", and chance does not explain it")


def no_promise(record: Mapping[str, Any]) -> str:
    """Return why nothing is promised; "": there are promises, or no thresholds."""
    if is_promised(record) or not (record["policy"]["error"] or record["hazards"]):
        return ""
    groups = record.get("chosen_groups", record["groups"])
    number = f"{groups['num_groups']:,} group{'s' * (groups['num_groups'] != 1)}"
    return (
        f"no error and no recall is promised: the thresholds were chosen on images of {number} ({groups['rule']}), and "
        "images of a group resemble each other"
    )


def _no_guarantee(
    wrong: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], max_error: float, level: float, error: float
) -> DecisionError:
    """Return the error for a guarantee that cannot be had, with the number of images that could give it."""
    total = len(wrong)
    best = 0
    for end in ends.tolist():
        share = wrong[end] / (end + 1)
        if share < max_error and (n := _needed(share, max_error, error)):
            images = ceil(n * total / (end + 1))
            best = min(best or images, images)
    return DecisionError(
        f"no threshold on {total} images keeps the error at {max_error:g} with confidence {level:g}",
        "what the model decides alone would have no guarantee",
        f"about {max(best - total, 1):,} more images in the split would do with this model, or raise --max-error"
        if best
        else "the most confident answers are wrong more often than that: train a better model, or raise --max-error",
    )


def _needed(share: float, max_error: float, error: float) -> int:
    """Return how many samples with this share of errors have an upper bound of at most `max_error`; 0: too many."""
    low, high = 1, 2
    while high < _MOST_SAMPLES and tail(round(share * high), high, max_error) > error:
        low, high = high, 2 * high
    if high >= _MOST_SAMPLES:
        return 0
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if tail(round(share * middle), middle, max_error) <= error else (middle, high)
    return high
