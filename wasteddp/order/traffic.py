"""Which shards each node of a cluster reads in an epoch, and how many of them at the same time. Pure arithmetic.

Legend: S shards, B block; a node is the ranks of one machine, which share a cache and own neighbouring lanes.

Remote shards are fetched whole, so a node fetches every shard that its lanes touch. The least possible is its share of
the set. With B = 1 each node soon touches every shard; with blocks of a shard's size, each shard stays on one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wasteddp.order.plan import TrainPlan

_CHUNK = 1 << 17  # positions examined in one call
_STEPS = 10  # steps that count as "at once"
_PLACES = 8  # places in an epoch where `at_once` is measured


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the nodes that were examined read."""

    most_shards: int  # largest number of shards that one node touches in an epoch
    fetched: float  # bytes that the nodes fetch, as a multiple of their share of the set
    at_once: int  # largest number of shards that one node reads within ten steps: its cache must hold them


def measure(
    plan: TrainPlan, shard_bytes: Sequence[int], *, num_nodes: int, nodes: Sequence[int] | None = None, epoch: int = 0
) -> Traffic:
    """Compute the traffic of some of `num_nodes` nodes; of all of them if `nodes` is None."""
    nodes = range(num_nodes) if nodes is None else nodes
    sizes = np.asarray(shard_bytes, dtype=np.float64)
    most, fetched, at_once = 0, 0.0, 0
    begins = plan.block_begins(epoch) if plan.block > 1 else None
    for node in nodes:
        touched = _touched(plan, epoch, node, num_nodes, begins)
        most = max(most, int(touched.sum()))
        fetched += float(sizes[touched].sum())
        at_once = max(at_once, _at_once(plan, epoch, node, num_nodes))
    return Traffic(most, fetched / (len(nodes) * float(sizes.sum()) / num_nodes), at_once)


def _touched(
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
