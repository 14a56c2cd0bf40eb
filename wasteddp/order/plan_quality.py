"""The quality of a plan: how far its order is from a uniform permutation, and which shards each node reads.

Legend: N samples, S shards, G global batch, B block, C kinds of samples, n samples in one batch or in several
consecutive ones; a node is the ranks of one machine, which share a cache and own neighbouring lanes.

Shuffle. Reading in blocks is harmless if neighbours in the shards have nothing in common, and harmful if they belong to
one class. The measure is the design effect of cluster sampling: the variance of a batch's composition, divided by that
of a uniform sample of the same size. With n_c of n samples of kind c, and the fraction p_c in the whole set,

    effect = E[ sum_c (n_c / n - p_c)^2 ]  /  ( 1/n * (N - n) / (N - 1) * (1 - sum_c p_c^2) )

where the denominator follows from the multivariate hypergeometric distribution. The share of a batch is 1 / effect, at
most 1: a batch of 256 with a share of 0.25 represents the set as well as 64 samples drawn uniformly. `recent` is the
share of ten consecutive batches, since momentum 0.9 averages over 1 / (1 - 0.9) steps: batches that are each a good
mixture, but are all similar, carry ten times less information than their number suggests.

Kinds are the classes, if the labels are known. Otherwise the worst case is assumed: the samples are cut into 64 equal
stretches, each of one kind, as in a set sorted by class.

Traffic. Remote shards are fetched whole, so a node fetches every shard that its lanes touch. The least possible is its
share of the set. With B = 1 each node soon touches every shard; with blocks of a shard's size, each shard stays on one
node.

Source: Kish, Survey Sampling (1965), chapter 5, for the design effect; the denominator is the variance of the
multivariate hypergeometric distribution, summed over its components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from wasteddp.order.keyed_random import I64
from wasteddp.order.plan import TrainPlan

Labels = npt.NDArray[np.integer]

GOOD_SHARE = 0.5
_STRETCHES = 64
_RECENT_STEPS = 10
_EPOCHS = 4  # epochs that are sampled
_SAMPLES = 500_000  # approximate number of samples examined; at least four groups are
_ADVICE_GROUPS = 24

_CHUNK = 1 << 17  # positions examined in one call
_STEPS = 10  # steps that count as "at once"
_PLACES = 8  # places in an epoch where `at_once` is measured


@dataclass(frozen=True, slots=True)
class Quality:
    """Shares in (0, 1]; 1 is as good as a uniform order. Estimated from 64 batches, their error is about a tenth."""

    batch: float
    recent: float

    @property
    def is_good(self) -> bool:
        return min(self.batch, self.recent) >= GOOD_SHARE


def measure_shuffle(plan: TrainPlan, labels: Labels | None = None, *, most_groups: int = 64) -> Quality:
    """Estimate the quality of a plan from some steps of some epochs.

    Args:
        plan: to examine.
        labels: of each sample, [N]; None assumes the worst case.
        most_groups: largest number of groups of consecutive batches to examine; large batches reduce it.
    """
    # at most a quarter of an epoch: ten steps of eleven always represent the epoch well
    recent = min(_RECENT_STEPS, max(1, plan.steps_per_epoch // 4))
    groups = max(4, min(most_groups, _SAMPLES // (recent * plan.global_batch)))
    fractions = _fractions(plan, labels)
    batch_errors, recent_errors = [], []
    for group in range(groups):
        first = group * (plan.steps_per_epoch - recent) // max(groups - 1, 1)
        samples = plan.steps_samples(group % _EPOCHS, range(first, first + recent))
        counts = np.stack(
            [np.bincount(_kinds(plan, labels, one), minlength=len(fractions)) for one in samples]
        )  # [steps, C]
        batch_errors += [((one / plan.global_batch - fractions) ** 2).sum() for one in counts]
        recent_errors.append(((counts.sum(0) / (recent * plan.global_batch) - fractions) ** 2).sum())
    return Quality(
        _share(plan.num_draws, plan.global_batch, fractions, float(np.mean(batch_errors))),
        _share(plan.num_draws, recent * plan.global_batch, fractions, float(np.mean(recent_errors))),
    )


def advise(plan: TrainPlan, labels: Labels | None = None) -> tuple[TrainPlan, Quality] | None:
    """Return the plan closest to this one that is good, and its quality: the smallest window, or a smaller block.

    Returns None if only a block of 1 is good.
    """
    block = min(plan.block, plan.num_samples)
    while block > 1:
        windows = [block * 2**power for power in range(1, 64) if block * 2**power < plan.lane_length]
        widest = replace(plan, block=block, window=plan.lane_length)
        if (
            best := measure_shuffle(widest, labels, most_groups=_ADVICE_GROUPS)
        ).is_good:  # if not, no smaller window is
            for window in windows:
                candidate = replace(plan, block=block, window=window)
                if (found := measure_shuffle(candidate, labels, most_groups=_ADVICE_GROUPS)).is_good:
                    return candidate, found
            return widest, best
        block //= 2
    return None


def describe(plan: TrainPlan, labels: Labels | None = None) -> str:
    """Return a line about the quality of the shuffle, with a line of advice if it is poor."""
    found = measure_shuffle(plan, labels)
    kinds = "if neighbours in the shards are alike" if labels is None else "judged by its classes"
    line = (
        f"order: blocks of {plan.block}, window {plan.window}, {plan.lanes} lanes; {kinds}, a batch of "
        f"{plan.global_batch} is worth {found.batch * plan.global_batch:.0f} uniform samples, and "
        f"{_RECENT_STEPS} batches are worth {found.recent * _RECENT_STEPS:.1f}"
    )
    if found.is_good:
        return line
    better = advise(plan, labels)
    if better is None:
        return f"{line}\n  poor: set data.block to 1, or shard the images again in a shuffled order"
    changes = [
        f"data.{name} {getattr(better[0], name)}"
        for name in ("block", "window")
        if getattr(better[0], name) != getattr(plan, name)
    ]
    return (
        f"{line}\n  poor: with {' and '.join(changes)} these would be {better[1].batch * plan.global_batch:.0f} and "
        f"{better[1].recent * _RECENT_STEPS:.1f}"
    )


def _fractions(plan: TrainPlan, labels: Labels | None) -> npt.NDArray[np.float64]:
    """Return p_c: float64 [C]."""
    if plan.balance:
        shares: npt.NDArray[np.float64] = plan.balance.quotas / plan.num_draws
        return shares
    if labels is not None:
        return np.bincount(labels) / plan.num_samples
    num = min(_STRETCHES, plan.num_samples)
    begins = -(-np.arange(num + 1) * plan.num_samples // num)  # first sample of each stretch, as in `_kinds`
    fractions: npt.NDArray[np.float64] = np.diff(begins) / plan.num_samples
    return fractions


def _kinds(plan: TrainPlan, labels: Labels | None, samples: I64) -> npt.NDArray[np.integer]:
    if labels is not None:
        return labels[samples % plan.num_samples]
    return samples * min(_STRETCHES, plan.num_samples) // plan.num_samples


def _share(population: int, size: int, fractions: npt.NDArray[np.float64], error: float) -> float:
    """Return 1 / effect, at most 1."""
    uniform = (population - size) / max(population - 1, 1) / size * (1 - float((fractions**2).sum()))
    return 1.0 if error <= uniform else uniform / error


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the nodes that were examined read."""

    most_shards: int  # largest number of shards that one node touches in an epoch
    fetched: float  # bytes that the nodes fetch, as a multiple of their share of the set
    at_once: int  # largest number of shards that one node reads within ten steps: its cache must hold them


def measure_traffic(
    plan: TrainPlan, shard_bytes: Sequence[int], *, num_nodes: int, nodes: Sequence[int] | None = None, epoch: int = 0
) -> Traffic:
    """Compute the traffic of some of `num_nodes` nodes; of all of them if `nodes` is None."""
    nodes = range(num_nodes) if nodes is None else nodes
    sizes = np.asarray(shard_bytes, dtype=np.float64)
    most, fetched, at_once = 0, 0.0, 0
    begins = plan.block_begins(epoch) if plan.block > 1 else None
    for node in nodes:
        touched = _find_touched(plan, epoch, node, num_nodes, begins)
        most = max(most, int(touched.sum()))
        fetched += float(sizes[touched].sum())
        at_once = max(at_once, _at_once(plan, epoch, node, num_nodes))
    return Traffic(most, fetched / (len(nodes) * float(sizes.sum()) / num_nodes), at_once)


def _find_touched(
    plan: TrainPlan, epoch: int, node: int, num_nodes: int, begins: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.bool_]:
    """Return whether a node reads each shard: bool [S]. A window does not move samples out of their lane."""
    touched = np.zeros(plan.num_shards, dtype=np.bool_)
    first, last = (plan.lanes * n // num_nodes * plan.lane_length for n in (node, node + 1))
    if begins is not None:
        inside = begins[np.searchsorted(begins, first) : np.searchsorted(begins, last)]
        positions = np.concatenate([[first], inside])  # a block is in one shard, that of its first sample
        touched[plan.shard_of(plan.samples_at(epoch, positions))] = True
        return touched
    for at in range(first, last, _CHUNK):
        positions = np.arange(at, min(at + _CHUNK, last), dtype=np.int64)
        touched[plan.shard_of(plan.samples_at(epoch, positions))] = True
        if touched.all():
            break
    return touched


def _at_once(plan: TrainPlan, epoch: int, node: int, num_nodes: int) -> int:
    steps = min(_STEPS, plan.steps_per_epoch)
    most = 0
    for place in range(_PLACES):
        first = place * (plan.steps_per_epoch - steps) // (_PLACES - 1)
        samples = plan.steps_samples(epoch, range(first, first + steps), rank=node, world_size=num_nodes)
        most = max(most, len(np.unique(plan.shard_of(samples))))
    return most
