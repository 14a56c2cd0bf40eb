"""From probabilities to a decision: a bin, or a person who looks.

Legend: N items, K classes, B bins; the number B stands for a person.

The order of the rules: a hazard comes first and is never traded against cost; then the bin of least expected cost, or
the most probable one if there are no costs; then a person, where that costs less or the confidence is below the
threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.decisions.binomial import F64
from wasteddp.decisions.bins import BinRules
from wasteddp.decisions.thresholds import (
    ErrorThreshold,
    RecallThreshold,
    choose_error_threshold,
    choose_recall_threshold,
)

I64 = npt.NDArray[np.int64]
REASONS = ("", "hazard", "cost", "doubt")  # why the decision is not the most probable bin


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """N decisions."""

    assigned: I64  # [N], bins; B: a person
    confidence: F64  # [N], probability of the bin that is best without a person and without hazards
    reasons: I64  # [N], numbers in REASONS


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """The rules and the thresholds that were chosen for a model."""

    rules: BinRules
    error: ErrorThreshold | None = None
    hazards: Mapping[str, RecallThreshold] = field(default_factory=dict)  # by class

    def decide(self, probabilities_NK: npt.ArrayLike) -> Decisions:
        """Decide for each item. `probabilities_NK` are calibrated."""
        shares_NK = np.asarray(probabilities_NK, np.float64)
        assigned, confidence, by_cost = _best_bins(shares_NK, self.rules)
        reasons = np.zeros(len(assigned), np.int64)
        person = len(self.rules.bins)
        reasons[by_cost] = REASONS.index("cost")
        if self.error is not None:
            in_doubt = ~by_cost & (confidence < self.error.threshold)
            reasons[in_doubt] = REASONS.index("doubt")
        assigned[reasons > 0] = person
        if self.hazards:
            flagged_N, bins_N = _flag_hazards(shares_NK, self.rules, self.hazards)
            assigned[flagged_N], reasons[flagged_N] = bins_N[flagged_N], REASONS.index("hazard")
        return Decisions(assigned, confidence, reasons)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values; `from_json` is the inverse."""
        rules = self.rules
        return {
            "name": rules.name,
            "sha256": rules.sha256,
            "classes": list(rules.classes),
            "bins": [rules.bins[number] for number in rules.bin_of],  # of each class
            "costs": None if rules.costs_KB is None else rules.costs_KB.tolist(),
            "person": rules.person,
            "error": asdict(self.error) if self.error else None,
            "hazards": {name: asdict(one) for name, one in self.hazards.items()},
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Policy:
        """Raises: KeyError, TypeError, ValueError, AttributeError: it is not a policy."""
        classes, of = tuple(map(str, raw["classes"])), [str(name) for name in raw["bins"]]
        bins = tuple(dict.fromkeys(of))
        costs_KB = None if raw["costs"] is None else np.array(raw["costs"], np.float64)
        if len(of) != len(classes) or (costs_KB is not None and costs_KB.shape != (len(classes), len(bins))):
            raise ValueError("its tables do not have the size of its classes")
        rules = BinRules(
            name=str(raw["name"]),
            classes=classes,
            bins=bins,
            bin_of=tuple(bins.index(name) for name in of),
            costs_KB=costs_KB,
            person=None if raw["person"] is None else float(raw["person"]),
            sha256=str(raw["sha256"]),
        )
        error = ErrorThreshold(**raw["error"]) if raw["error"] else None
        hazards = {classes[classes.index(name)]: RecallThreshold(**one) for name, one in raw["hazards"].items()}
        return cls(rules, error, hazards)


def choose_policy(
    rules: BinRules,
    labels: npt.ArrayLike,
    probabilities_NK: npt.ArrayLike,
    *,
    max_error: float | None = None,
    level: float = 0.95,
) -> Policy:
    """Choose the thresholds on a split that the model was not trained on.

    Args:
        labels: true classes, int [N].
        probabilities_NK: calibrated.
        max_error: share of items in a wrong bin among those that no person sees; None: no such threshold. Items that a
            hazard's threshold diverts are not among them.
        level: probability with which `max_error` holds.

    Raises:
        DecisionError: there are too few images for a guarantee.
    """
    shares_NK, truth = np.asarray(probabilities_NK, np.float64), np.asarray(labels, np.int64)
    hazards = {}
    for one in rules.hazards:
        k = rules.classes.index(one.class_name)
        hazards[one.class_name] = choose_recall_threshold(
            shares_NK[truth == k, k], recall=one.recall, level=one.confidence, name=f"the hazard {one.class_name}"
        )
    error = None
    if max_error is not None:
        assigned, confidence, by_cost = _best_bins(shares_NK, rules)
        alone = ~by_cost
        if hazards:
            alone &= ~_flag_hazards(shares_NK, rules, hazards)[0]
        is_right = np.asarray(rules.bin_of)[truth] == assigned
        error = choose_error_threshold(np.where(alone, confidence, -np.inf), is_right, max_error=max_error, level=level)
    return Policy(rules, error, hazards)


def _best_bins(shares_NK: F64, rules: BinRules) -> tuple[I64, F64, npt.NDArray[np.bool_]]:
    """Return the best bin [N], its probability [N], and where a person costs less than it [N].

    Source of the least expected cost: Elkan 2001, The foundations of cost-sensitive learning.
    """
    bins_NB = rules.probabilities(shares_NK)
    rows = np.arange(len(bins_NB))
    by_cost = np.zeros(len(bins_NB), np.bool_)
    if rules.costs_KB is None:
        best = bins_NB.argmax(axis=1)
    else:
        costs_NB = shares_NK @ rules.costs_KB
        best = costs_NB.argmin(axis=1)
        if rules.person is not None:
            by_cost = costs_NB[rows, best] > rules.person
    return best, bins_NB[rows, best], by_cost


def _flag_hazards(
    shares_NK: F64, rules: BinRules, hazards: Mapping[str, RecallThreshold]
) -> tuple[npt.NDArray[np.bool_], I64]:
    """Return which items a hazard's threshold diverts [N], and the bins of those hazards [N].

    Where several do, the one whose probability exceeds its threshold by the largest factor wins.
    """
    excess_NH = np.stack(
        [shares_NK[:, rules.classes.index(name)] / max(one.threshold, 1e-300) for name, one in hazards.items()],
        axis=1,
    )
    bins_H = np.array([rules.bin_of[rules.classes.index(name)] for name in hazards])
    return np.asarray((excess_NH >= 1).any(axis=1)), bins_H[excess_NH.argmax(axis=1)]
