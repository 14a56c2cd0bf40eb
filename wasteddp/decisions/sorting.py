"""What ends up in which bin: purity, recovery and contamination, by count and by mass.

Legend: N items, K classes, B bins; the number B stands for a person.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.decisions.decide import PERSON, BinRules
from wasteddp.decisions.intervals import F64, bootstrap_interval, wilson_interval

I64 = npt.NDArray[np.int64]
Interval = tuple[float, float, float]  # value, and its 95 % interval


@dataclass(frozen=True, slots=True)
class BinFigures:
    """One bin. Shares are in 0..1, or NaN where nothing is in the bin or belongs in it.

    Purity: what belongs in it, of all in it. Recovery: what belongs in it and is in it, of all that belongs in it.
    Images of single items are not a sample of a plant's belt, so this is not the purity of a bale.
    """

    name: str
    num_items: int
    num_belonging: int
    purity: Interval
    recovery: Interval
    contamination: tuple[
        tuple[str, float], ...
    ]  # classes that do not belong, and their share of the bin; largest first

    def to_json(self) -> dict[str, Any]:
        return {
            "bin": self.name,
            "items": self.num_items,
            "belonging": self.num_belonging,
            "purity": _plain(self.purity),
            "recovery": _plain(self.recovery),
            "contamination": [{"class": name, "share": share} for name, share in self.contamination],
        }


def contents(labels: npt.ArrayLike, assigned: npt.ArrayLike, rules: BinRules) -> I64:
    """Count the items of each true class in each bin, and with a person in the last column: int64 [K, B + 1]."""
    width = len(rules.bins) + 1
    pairs = np.asarray(labels, np.int64) * width + np.asarray(assigned, np.int64)
    return np.bincount(pairs, minlength=len(rules.classes) * width).reshape(len(rules.classes), width)


def measure_bins(
    labels: npt.ArrayLike,
    assigned: npt.ArrayLike,
    rules: BinRules,
    *,
    by_mass: bool = False,
    groups: npt.ArrayLike | None = None,
) -> tuple[BinFigures, ...]:
    """Return the figures of each bin, with intervals by resampling items or, if given, groups.

    Args:
        labels: true classes, int [N].
        assigned: bins, int [N]; B for a person.
        by_mass: weigh each item by its class's `grams`.
    """
    truth, where = np.asarray(labels, np.int64), np.asarray(assigned, np.int64)
    mass = np.asarray(rules.grams) if by_mass else np.ones(len(rules.classes))
    counts_KB = contents(truth, where, rules)
    return tuple(_figures(number, rules, counts_KB, mass, truth, where, groups) for number in range(len(rules.bins)))


def per_thousand(labels: npt.ArrayLike, assigned: npt.ArrayLike, rules: BinRules) -> list[dict[str, Any]]:
    """Return where 1,000 items like these would go: for each bin and a person, how many are right and wrong in it."""
    counts_KB = contents(labels, assigned, rules)
    scale = 1000 / max(1, int(counts_KB.sum()))
    rows = []
    for number, name in enumerate((*rules.bins, PERSON)):
        total = int(counts_KB[:, number].sum())
        right = sum(int(counts_KB[k, number]) for k, own in enumerate(rules.bin_of) if own == number)
        is_bin = number < len(rules.bins)
        rows.append({"bin": name, "items": total * scale, "wrong": (total - right) * scale if is_bin else None})
    return rows


def _figures(
    number: int, rules: BinRules, counts_KB: I64, mass: F64, truth: I64, where: I64, groups: npt.ArrayLike | None
) -> BinFigures:
    belongs = np.asarray(rules.bin_of) == number
    weight = mass[truth]
    is_own, is_in = belongs[truth], where == number

    inside_K = counts_KB[:, number] * mass
    foreign = [
        (rules.classes[k], _share(inside_K[k], inside_K.sum())) for k in np.flatnonzero(~belongs & (inside_K > 0))
    ]
    return BinFigures(
        rules.bins[number],
        int(is_in.sum()),
        int(is_own.sum()),
        _with_interval(weight * (is_own & is_in), weight * is_in, groups),
        _with_interval(weight * (is_own & is_in), weight * is_own, groups),
        tuple(sorted(foreign, key=lambda one: -one[1])),
    )


def _with_interval(part_N: F64, whole_N: F64, groups: npt.ArrayLike | None) -> Interval:
    """Return the share of the whole, and its interval: of counts, Wilson's; of masses and over groups, by resampling.

    Resampling gives no interval for a share of 0 or 1, as all draws have it. Then it is Wilson's of the number of
    groups, or of as many equal items as the masses are worth (Kish 1965, Survey Sampling: their effective number).
    """
    part, whole = float(part_N.sum()), float(whole_N.sum())
    share = _share(part, whole)
    there = whole_N[whole_N > 0]
    if groups is not None:
        number = float(len(np.unique(np.asarray(groups)[whole_N > 0])))
    else:
        number = whole**2 / float(there @ there) if len(there) else 0.0
    if share in (0.0, 1.0) or not len(there) or (groups is None and there.min() == there.max()):
        return share, *wilson_interval(share * number if number else 0.0, number)
    if number < 2 and groups is not None:
        return share, float("nan"), float("nan")
    return share, *bootstrap_interval(
        lambda rows: _share(part_N[rows].sum(), whole_N[rows].sum()), len(whole_N), groups=groups
    )


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else float("nan")


def _plain(values: Interval) -> list[float | None]:
    return [None if value != value else value for value in values]
