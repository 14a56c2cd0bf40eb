"""Where each class goes, and what errors cost. K classes, B bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wasteddp.decisions.binomial import F64

PERSON = "person"  # in the place of a bin: a person decides


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
