"""How often each class is drawn in an epoch, and which of its images then: balanced sampling as arithmetic. No torch.

Legend: N samples of the split, K classes, n_c samples of class c; D draws of an epoch, q_c of them of class c; b how
even the classes are to be.

q_c is in proportion to n_c^(1 - b), rounded so that all are D together. Each class is walked through again and again,
each time in another order, and an epoch goes on where the one before it ended:

    class c    [ n_c samples      ][ n_c samples      ][ n_c samples      ]     each pass a keyed permutation of its own
    epochs     |- q_c -|- q_c -|- q_c -|- q_c -|- q_c -|- q_c -|

So q_c is exact in each epoch, after any number of epochs the samples of a class differ by at most one in how often they
were drawn, and every draw follows from (seed, epoch, its number): nothing is counted or stored as training goes.
`TrainPlan` shuffles the D draws and deals them out as it does with samples. Memory: 8 bytes a sample, for the classes'
lists; the index that the labels come from has 48.

Source: Kang et al. 2020, "Decoupling Representation and Classifier for Long-Tailed Recognition", section 3, whose
exponent q is 1 - b: 0 draws images alike, 1 classes alike, 1/2 is square-root sampling (Mahajan et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wasteddp.errors import SettingsError
from wasteddp.order.keyed_random import BALANCE, I64, permute

_UNIT = 1 << 40  # weights are whole multiples of 1 / _UNIT: the last bit of a machine's pow() decides about no draw
_MOST_NAMED = 12


@dataclass(frozen=True, slots=True, eq=False)
class Balance:
    """The draws of each epoch."""

    seed: int
    evenness: float  # b
    quotas: I64  # q_c: [K]
    sizes: I64  # n_c: [K]
    members: I64  # the samples, class by class: [N]

    @classmethod
    def of(cls, labels: npt.ArrayLike, evenness: float, *, num_classes: int, num_draws: int, seed: int) -> Balance:
        """Args: labels of the samples, [N]; b in [0, 1]; K; D.

        Raises:
            SettingsError: fewer draws than classes.
        """
        labels = np.asarray(labels)
        sizes = np.bincount(labels, minlength=num_classes).astype(np.int64)
        order = np.argsort(labels, kind="stable").astype(np.int64)
        return cls(seed, evenness, quotas(sizes.tolist(), evenness, num_draws), sizes, order)

    @property
    def num_draws(self) -> int:
        """D."""
        return int(self.quotas.sum())

    def samples(self, epoch: int, draw: I64) -> I64:
        """What the draws 0 .. D-1 of an epoch are, before they are shuffled.

        In the k-th pass through its class that the epoch has a part of, from 0, a sample has the number sample + k * N:
        none comes twice in an epoch, so what is keyed by it (crop, flip, ...) differs each time.
        """
        ends = np.cumsum(self.quotas)
        label = np.searchsorted(ends, draw, side="right")
        first = epoch * self.quotas
        position = (first - ends + self.quotas)[label] + draw
        passes = position // self.sizes[label] - first[label] // self.sizes[label]
        numbers: I64 = self.walk(label, position) + passes * len(self.members)
        return numbers

    def walk(self, label: int | npt.NDArray[np.integer], position: I64) -> I64:
        """The samples at some positions of the endless walk through a class, 0 being the first draw of the first epoch.

        Args:
            label: of all positions, or of each.
        """
        size = self.sizes[label]
        begin = (np.cumsum(self.sizes) - self.sizes)[label]
        within = permute(position % size, size, BALANCE, self.seed, label, position // size)
        found: I64 = self.members[begin + within]
        return found

    def describe(self, classes: Sequence[str]) -> str:
        """A line: the draws of each class in an epoch; of many classes those drawn most and least often."""
        often = [q / max(n, 1) for q, n in zip(self.quotas.tolist(), self.sizes.tolist(), strict=True)]
        labels = list(range(len(classes)))
        if len(labels) > _MOST_NAMED:
            labels.sort(key=lambda label: -often[label])
            labels = labels[: _MOST_NAMED // 2] + labels[-(_MOST_NAMED // 2) :]
        named = [f"{classes[c]} {self.quotas[c]} of {self.sizes[c]} images ({often[c]:.2f} times each)" for c in labels]
        of_all = f", of {len(classes)} classes the most and the least often drawn" if len(labels) < len(classes) else ""
        return f"balance {self.evenness:g}: draws in an epoch{of_all}: {', '.join(named)}"


def quotas(sizes: Sequence[int], evenness: float, num_draws: int) -> I64:
    """q_c, num_draws together, in proportion to n_c^(1 - b), by largest remainder: int64 [K].

    A class that has samples has a draw at least: with none it would be in no epoch at all.

    Raises:
        SettingsError: fewer draws than classes that have samples.
    """
    if num_draws < (there := sum(size > 0 for size in sizes)):
        raise SettingsError(
            f"data.balance is {evenness:g}; an epoch has {num_draws} draws and there are {there} classes",
            "some classes would never be drawn",
            "set train.batch_size so that more of the split fits into an epoch, or data.balance to 0",
        )
    largest = max(sizes)
    # Python's integers, since num_draws * _UNIT may be above 2^63; an empty class has no weight, though 0^0 is 1
    weights = [round(_UNIT * (size / largest) ** (1 - evenness)) if size else 0 for size in sizes]
    shares = [divmod(num_draws * weight, sum(weights)) for weight in weights]
    found = [whole for whole, _ in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda label: (-shares[label][1], label))
    for label in by_remainder[: num_draws - sum(found)]:
        found[label] += 1
    for label, size in enumerate(sizes):
        if size and not found[label]:
            found[label] = 1
            found[found.index(max(found))] -= 1
    return np.array(found, dtype=np.int64)
