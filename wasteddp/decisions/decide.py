"""Where each class goes, what errors cost, and from probabilities to a decision: a bin, or a person who looks.

Legend: N items, K classes, B bins; the number B stands for a person.

The order of the rules: a hazard comes first and is never traded against cost. An item that may be hazards of several
bins goes to a person: any one bin would miss the others. Then follows the bin of least expected cost, or the most
probable one if there are no costs; then a person, where that costs less or the confidence is below the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.decisions.intervals import F64
from wasteddp.decisions.thresholds import (
    ErrorThreshold,
    RecallThreshold,
    choose_error_threshold,
    choose_recall_threshold,
)

PERSON = "person"  # in the place of a bin: a person decides
I64 = npt.NDArray[np.int64]
REASONS = ("", "hazard", "cost", "doubt")  # the rule that decided; "": the best bin


@dataclass(frozen=True, slots=True)
class Hazard:
    """A floor of the recall of a class, and the confidence with which it must hold."""

    class_name: str
    recall: float
    confidence: float


@dataclass(frozen=True, slots=True, eq=False)
class BinRules:
    """Where each class goes. Fields of K and B values have the order of `classes` and `bins`."""

    name: str
    classes: tuple[str, ...]
    bins: tuple[str, ...]
    bin_of: tuple[int, ...]  # [K], numbers of bins
    grams: tuple[float, ...] = ()  # [K], or () if no mass is given
    hazards: tuple[Hazard, ...] = ()
    costs_KB: F64 | None = None  # of an item of class k in bin b; None: no costs are given
    person: float | None = None  # cost of a person's look
    sha256: str = ""  # of the file

    @classmethod
    def of_map(cls, bins: Mapping[str, str], classes: Sequence[str]) -> BinRules:
        """Return the rules of a `class: bin` map, such as the manifest's; without it, each class is its own bin."""
        of = {name: bins.get(name, name) for name in classes}
        names = tuple(dict.fromkeys(of.values()))
        return cls("", tuple(classes), names, tuple(names.index(of[name]) for name in classes))

    def probabilities(self, probabilities_NK: Any) -> F64:
        """Return the probability of each bin, the sum of its classes': float64 [N, B]."""
        member_KB = np.zeros((len(self.classes), len(self.bins)))
        member_KB[np.arange(len(self.classes)), self.bin_of] = 1.0
        return np.asarray(np.asarray(probabilities_NK, np.float64) @ member_KB)


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
        reached_NH = self.reach_hazards(shares_NK)
        bins_H = np.array([self.rules.bin_of[self.rules.classes.index(name)] for name in self.hazards], np.int64)
        first_N = np.where(reached_NH, bins_H, person).min(axis=1, initial=person)
        last_N = np.where(reached_NH, bins_H, -1).max(axis=1, initial=-1)
        flagged_N = reached_NH.any(axis=1)
        assigned[flagged_N] = np.where(first_N == last_N, first_N, person)[flagged_N]
        reasons[flagged_N] = REASONS.index("hazard")
        return Decisions(assigned, confidence, reasons)

    def reach_hazards(self, probabilities_NK: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which hazards' thresholds each item reaches: bool [N, H], in the order of `hazards`."""
        return _reach(np.asarray(probabilities_NK, np.float64), self.rules, self.hazards)

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
        if PERSON in bins:
            raise ValueError(f"a bin is called {PERSON!r}")
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
        for threshold in (*((error,) if error else ()), *hazards.values()):
            _check_numbers(threshold)
        given = [*(() if costs_KB is None else costs_KB.ravel()), *(() if rules.person is None else (rules.person,))]
        if not (np.isfinite(given).all() and (np.array(given) >= 0).all()):
            raise ValueError("a cost is not a number from 0")
        return cls(rules, error, hazards)


def _check_numbers(threshold: ErrorThreshold | RecallThreshold) -> None:
    """Check that a threshold from a file is one: with NaN, no item would be in doubt, and none a hazard.

    Raises:
        TypeError, ValueError: a field is not a number, or not a share.
    """
    for name, value in asdict(threshold).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r}, not a number")
        if not 0 <= value <= (float("inf") if name.startswith("num_") else 1.0 + 1e-6):
            raise ValueError(f"{name} is {value}")


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
        alone = ~by_cost & ~_reach(shares_NK, rules, hazards).any(axis=1)
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


def _reach(shares_NK: F64, rules: BinRules, hazards: Mapping[str, RecallThreshold]) -> npt.NDArray[np.bool_]:
    # A threshold may be 0, if the model gives images of the hazard the probability 0: all items reach it.
    columns = np.array([rules.classes.index(name) for name in hazards], np.int64)
    thresholds_H = np.array([one.threshold for one in hazards.values()], np.float64)
    return np.asarray(shares_NK[:, columns] >= thresholds_H)
