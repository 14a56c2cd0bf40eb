"""Balanced sampling as arithmetic: how often each class is drawn in an epoch, and which of its samples. No torch.

Legend: N samples of the split, K classes, n_c samples of class c; D draws in an epoch, q_c of them from class c; b the
evenness of the classes.

q_c is proportional to n_c^(1 - b), rounded so that the q_c add up to D. The draws of a class pass through its samples
repeatedly. Each pass has a different order, and an epoch continues where the previous epoch ended:

    class c    [ n_c samples      ][ n_c samples      ][ n_c samples      ]     each pass has its own keyed permutation
    epochs     |- q_c -|- q_c -|- q_c -|- q_c -|- q_c -|- q_c -|

So each epoch has exactly q_c draws of class c. After any number of epochs, the numbers of draws of two samples of a
class differ by at most one. Every draw is a function of (seed, epoch, draw number), so training keeps no counters.
`TrainPlan` shuffles the D draws and assigns them to lanes as it does with samples. Memory: 8 bytes a sample for the
lists of the classes' samples; the index that holds the labels takes 48.

Source: Kang et al. 2020, "Decoupling Representation and Classifier for Long-Tailed Recognition", section 3, whose
exponent q is 1 - b: with b = 0 all images are drawn equally often, with b = 1 all classes; b = 1/2 is square-root
sampling (Mahajan et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wasteddp.errors import SettingsError
from wasteddp.order.keyed_random import BALANCE, I64, permute

_UNIT = 1 << 40  # weights are multiples of 1 / _UNIT, so that the last bit of a machine's pow() changes no draw
_MOST_NAMED = 12


@dataclass(frozen=True, slots=True, eq=False)
class Balance:
    """The draws of each epoch."""

    seed: int
    evenness: float  # b
    quotas: I64  # q_c: [K]
    sizes: I64  # n_c: [K]
    members: I64  # the samples, sorted by class: [N]

    @classmethod
    def from_labels(
        cls, labels: npt.ArrayLike, evenness: float, *, num_classes: int, num_draws: int, seed: int
    ) -> Balance:
        """Compute the draws for a split.

        Args:
            labels: of the samples, [N].
            evenness: b, in [0, 1].
            num_classes: K.
            num_draws: D.
            seed: of the run.

        Raises:
            SettingsError: there are fewer draws than classes that have samples.
        """
        labels = np.asarray(labels)
        sizes = np.bincount(labels, minlength=num_classes).astype(np.int64)
        order = np.argsort(labels, kind="stable").astype(np.int64)
        return cls(seed, evenness, quotas(sizes.tolist(), evenness, num_draws), sizes, order)

    @property
    def num_draws(self) -> int:
        """Draws in an epoch, D."""
        return int(self.quotas.sum())

    def samples(self, epoch: int, draw: I64) -> I64:
        """Return the sample numbers of some draws (0 .. D-1) of an epoch, before they are shuffled.

        An epoch may draw a sample in several passes through its class. In the k-th of them, from 0, the sample has the
        number sample + k * N. No number occurs twice in an epoch, so crop, flip and the other random choices, which
        the number keys, differ each time.
        """
        ends = np.cumsum(self.quotas)
        label = np.searchsorted(ends, draw, side="right")
        first = epoch * self.quotas
        position = (first - ends + self.quotas)[label] + draw
        passes = position // self.sizes[label] - first[label] // self.sizes[label]
        numbers: I64 = self.walk(label, position) + passes * len(self.members)
        return numbers

    def walk(self, label: int | npt.NDArray[np.integer], position: I64) -> I64:
        """Return the samples at some positions in the sequence of all draws of a class.

        Args:
            label: the class, one for all positions or one for each.
            position: 0 is the first draw of the first epoch; there is no last position.
        """
        size = self.sizes[label]
        begin = (np.cumsum(self.sizes) - self.sizes)[label]
        within = permute(position % size, size, BALANCE, self.seed, label, position // size)
        found: I64 = self.members[begin + within]
        return found

    def describe(self, classes: Sequence[str]) -> str:
        """Return a line with the draws of each class in an epoch; of many classes, the most and least often drawn."""
        often = [q / max(n, 1) for q, n in zip(self.quotas.tolist(), self.sizes.tolist(), strict=True)]
        labels = list(range(len(classes)))
        if len(labels) > _MOST_NAMED:
            labels.sort(key=lambda label: -often[label])
            labels = labels[: _MOST_NAMED // 2] + labels[-(_MOST_NAMED // 2) :]
        named = [f"{classes[c]} {self.quotas[c]} of {self.sizes[c]} images ({often[c]:.2f} times each)" for c in labels]
        of_all = f", of {len(classes)} classes the most and the least often drawn" if len(labels) < len(classes) else ""
        return f"balance {self.evenness:g}: draws in an epoch{of_all}: {', '.join(named)}"


def quotas(sizes: Sequence[int], evenness: float, num_draws: int) -> I64:
    """Return q_c, proportional to n_c^(1 - b) and `num_draws` in total, by the largest-remainder method: int64 [K].

    A class that has samples gets at least one draw, or it would never occur in training.

    Raises:
        SettingsError: there are fewer draws than classes that have samples.
    """
    if num_draws < (there := sum(size > 0 for size in sizes)):
        raise SettingsError(
            f"data.balance is {evenness:g}, an epoch has {num_draws} draws, and {there} classes have samples",
            "some classes would never be drawn",
            "set train.batch_size so that an epoch uses more of the split, or set data.balance to 0",
        )
    largest = max(sizes)
    # Python integers, since num_draws * _UNIT may exceed 2^63. An empty class has weight 0, although 0^0 is 1.
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
