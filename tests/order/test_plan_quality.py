"""Shuffle quality: one for a uniform order, the theoretical value for blocks, and advice that is true if followed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from wasteddp.order import plan_quality
from wasteddp.order.plan import TrainPlan

SORTED = TrainPlan(64_000, 64, 0, 64, block=500, shard_samples=(1000,) * 64)


@pytest.mark.parametrize("num_samples", [64, 1000, 10**6, 10**9])
def test_a_uniform_order_is_as_good_as_uniform(num_samples: int) -> None:
    found = plan_quality.measure_shuffle(TrainPlan(num_samples, 64, 0, 64))
    # 640 batches and 64 groups of ten, each with 63 degrees of freedom: standard deviations of 0.7 % and 2.2 %
    assert found.batch > 0.96
    assert found.recent > 0.88


class _UniformDraws(TrainPlan):
    """Steps of a permutation by numpy, as a reference without the plan's own permutation."""

    def steps_samples(self, epoch: int, steps: range, *, rank: int = 0, world_size: int = 1) -> np.ndarray:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
        batches = order[steps.start * self.global_batch : steps.stop * self.global_batch]
        return batches.reshape(len(steps), self.global_batch)


def test_the_reference_is_numpys_uniform_permutation() -> None:
    effects = [plan_quality.measure_shuffle(_UniformDraws(6400, 64, seed, 64), most_groups=16) for seed in range(8)]
    assert np.mean([found.batch for found in effects]) > 0.96
    assert np.mean([found.recent for found in effects]) > 0.9


def test_one_lane_without_a_window_is_worth_its_blocks() -> None:
    # a batch has 64 neighbours of one or two kinds, so its share is that of one sample, 1/64
    assert plan_quality.measure_shuffle(replace(SORTED, lanes=1)).batch == pytest.approx(1 / 64, rel=0.1)


def test_a_lane_for_each_sample_makes_good_batches_that_are_alike() -> None:
    found = plan_quality.measure_shuffle(SORTED)
    assert found.batch > 0.9  # from 64 random blocks
    # ten batches of the same 64 blocks; 64 of 128 blocks without replacement vary less than 64 of many
    assert found.recent == pytest.approx(1 / 10 * 127 / 64, rel=0.1)


def test_a_wider_window_is_better() -> None:
    shares = [plan_quality.measure_shuffle(replace(SORTED, window=window)).recent for window in (0, 1000)]
    assert shares[1] > 1.5 * shares[0]


def test_classes_that_are_mixed_in_storage_need_no_window() -> None:
    mixed = np.random.default_rng(0).integers(0, 6, SORTED.num_samples)
    found = plan_quality.measure_shuffle(SORTED, mixed)
    assert found.batch > 0.9
    assert found.recent > 0.8
    by_class = np.sort(mixed)
    assert plan_quality.measure_shuffle(SORTED, by_class).recent < 0.3


@pytest.mark.parametrize("plan", [SORTED, replace(SORTED, lanes=1), replace(SORTED, lanes=8, block=5000, window=20)])
def test_advice_holds_when_it_is_followed(plan: TrainPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not plan_quality.measure_shuffle(plan).is_good
    advised = plan_quality.advise(plan)
    assert advised is not None
    better, promised = advised
    assert promised.is_good
    found = plan_quality.measure_shuffle(better)
    assert min(found.batch, found.recent) > 0.8 * plan_quality.GOOD_SHARE
    changed = [name for name in ("block", "window") if getattr(better, name) != getattr(plan, name)]
    monkeypatch.setattr(plan_quality, "advise", lambda *_: advised)  # a second time it would find the same
    said = plan_quality.describe(plan)
    assert all(f"data.{name} {getattr(better, name)}" in said for name in changed)


def test_a_good_order_is_left_alone() -> None:
    said = plan_quality.describe(TrainPlan(64_000, 64, 0, 64, block=2, window=500))
    assert "blocks of 2, window 500, 64 lanes" in said
    assert "poor" not in said


@pytest.mark.parametrize("num_samples", [1, 2, 5, 64])
def test_the_smallest_sets_can_be_measured(num_samples: int) -> None:
    for block in (1, 3, 100):
        found = plan_quality.measure_shuffle(TrainPlan(num_samples, 1, 0, 1, block))
        assert 0 < found.batch <= 1
        assert 0 < found.recent <= 1


SHARDS = (100, 0, 37, 250, 1, 90, 122)


@pytest.mark.parametrize(("block", "window"), [(1, 0), (7, 0), (50, 20), (250, 0)])
@pytest.mark.parametrize("num_nodes", [1, 2, 3, 12])
def test_it_counts_what_a_walk_through_every_step_finds(block: int, window: int, num_nodes: int) -> None:
    plan = TrainPlan(sum(SHARDS), 24, 0, 12, block, window, SHARDS)
    ends = np.cumsum(SHARDS)
    most, fetched = 0, 0
    for node in range(num_nodes):
        samples = plan.steps_samples(3, range(plan.steps_per_epoch), rank=node, world_size=num_nodes)
        shards = np.unique(np.searchsorted(ends, samples, side="right"))
        most, fetched = max(most, len(shards)), fetched + sum(10 * SHARDS[shard] for shard in shards)
    found = plan_quality.measure_traffic(plan, [10 * size for size in SHARDS], num_nodes=num_nodes, epoch=3)
    assert found.most_shards == most
    assert found.fetched == pytest.approx(fetched / (10 * sum(SHARDS)))
    assert 1 <= found.at_once <= most


def test_blocks_of_a_shard_keep_each_shard_on_one_node() -> None:
    plan = TrainPlan(64 * 100, 64, 0, 64, block=100, shard_samples=(100,) * 64)
    found = plan_quality.measure_traffic(plan, [1] * 64, num_nodes=8)
    assert found.most_shards <= 8 + 1  # a node's 800 samples are 8 shards, one of which may be cut in two
    assert found.fetched < 1.13
    uniform = plan_quality.measure_traffic(
        TrainPlan(64 * 100, 64, 0, 64, shard_samples=(100,) * 64), [1] * 64, num_nodes=8
    )
    assert (uniform.most_shards, uniform.fetched) == (64, 8)


def test_fewer_lanes_need_fewer_shards_at_once() -> None:
    few, many = (
        plan_quality.measure_traffic(
            TrainPlan(64 * 100, 64, 0, lanes, block=100, shard_samples=(100,) * 64), [1] * 64, num_nodes=4
        ).at_once
        for lanes in (4, 64)
    )
    assert few <= 3 < many
