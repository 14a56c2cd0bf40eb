"""Which shards the nodes of a cluster read: what each fetches in an epoch, and what it needs at once. Pure arithmetic.

Legend: S shards, B block; a node is the ranks of one machine, which share a cache, and owns neighbouring lanes.

Remote shards come whole, so what a node fetches is all shards that its lanes touch, and the least possible is its share
of the set. With B = 1 each node soon touches every shard; blocks of a shard's size keep each shard on one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wasteddp.order.plan import TrainPlan

_CHUNK = 1 << 17  # positions looked at at once
_STEPS = 10  # that "at once" means
_PLACES = 8  # of an epoch, looked at for it


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of the nodes that were looked at."""

    most_shards: int  # that one node touches in an epoch
    fetched: float  # bytes that the nodes fetch, as a multiple of their share of the set
    at_once: int  # most shards that one node reads from within ten steps: what its cache must hold


def measure(
    plan: TrainPlan, shard_bytes: Sequence[int], *, num_nodes: int, nodes: Sequence[int] | None = None, epoch: int = 0
) -> Traffic:
    """Looks at some nodes of `num_nodes`, all of them if `nodes` is None."""
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
    """Whether a node reads from each shard: bool [S]. A lane's window moves nothing out of the lane."""
    touched = np.zeros(plan.num_shards, dtype=np.bool_)
    first, last = (plan.lanes * n // num_nodes * plan.lane_length for n in (node, node + 1))
    if begins is not None:
        inside = begins[np.searchsorted(begins, first) : np.searchsorted(begins, last)]
        positions = np.concatenate([[first], inside])  # a block lies in one shard, so its first sample tells which
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
