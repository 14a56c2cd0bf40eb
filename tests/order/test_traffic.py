"""What nodes fetch: compared with a loop over every sample, and the minimum if blocks are shards."""

from __future__ import annotations

import numpy as np
import pytest

from wasteddp.order import traffic
from wasteddp.order.plan import TrainPlan

SHARDS = (100, 0, 37, 250, 1, 90, 122)


@pytest.mark.parametrize(("block", "window"), [(1, 0), (7, 0), (50, 20), (250, 0)])
@pytest.mark.parametrize("num_nodes", [1, 2, 3, 12])
def test_it_counts_what_a_walk_through_every_step_finds(block: int, window: int, num_nodes: int) -> None:
    plan = TrainPlan(sum(SHARDS), 24, 0, 12, block, window, SHARDS)
    ends = np.cumsum(SHARDS)
    most, fetched = 0, 0
    for node in range(num_nodes):
        steps = [plan.step_samples(3, k, rank=node, world_size=num_nodes) for k in range(plan.steps_per_epoch)]
        shards = np.unique(np.searchsorted(ends, np.concatenate(steps), side="right"))
        most, fetched = max(most, len(shards)), fetched + sum(10 * SHARDS[shard] for shard in shards)
    found = traffic.measure(plan, [10 * size for size in SHARDS], num_nodes=num_nodes, epoch=3)
    assert found.most_shards == most
    assert found.fetched == pytest.approx(fetched / (10 * sum(SHARDS)))
    assert 1 <= found.at_once <= most


def test_blocks_of_a_shard_keep_each_shard_on_one_node() -> None:
    plan = TrainPlan(64 * 100, 64, 0, 64, block=100, shard_samples=(100,) * 64)
    found = traffic.measure(plan, [1] * 64, num_nodes=8)
    assert found.most_shards <= 8 + 1  # a node's 800 samples are 8 shards, one of which may be cut in two
    assert found.fetched < 1.13
    uniform = traffic.measure(TrainPlan(64 * 100, 64, 0, 64, shard_samples=(100,) * 64), [1] * 64, num_nodes=8)
    assert (uniform.most_shards, uniform.fetched) == (64, 8)


def test_fewer_lanes_need_fewer_shards_at_once() -> None:
    few, many = (
        traffic.measure(
            TrainPlan(64 * 100, 64, 0, lanes, block=100, shard_samples=(100,) * 64), [1] * 64, num_nodes=4
        ).at_once
        for lanes in (4, 64)
    )
    assert few <= 3 < many
