"""Shuffle quality: one for a uniform order, the theoretical value for blocks, and advice that is true if followed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from wasteddp.order import shuffle_quality
from wasteddp.order.plan import TrainPlan

SORTED = TrainPlan(64_000, 64, 0, 64, block=500, shard_samples=(1000,) * 64)


@pytest.mark.parametrize("num_samples", [64, 1000, 10**6, 10**9])
def test_a_uniform_order_is_as_good_as_uniform(num_samples: int) -> None:
    found = shuffle_quality.measure(TrainPlan(num_samples, 64, 0, 64))
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
    effects = [shuffle_quality.measure(_UniformDraws(6400, 64, seed, 64), most_groups=16) for seed in range(8)]
    assert np.mean([found.batch for found in effects]) > 0.96
    assert np.mean([found.recent for found in effects]) > 0.9


def test_one_lane_without_a_window_is_worth_its_blocks() -> None:
    # a batch has 64 neighbours of one or two kinds, so its share is that of one sample, 1/64
    assert shuffle_quality.measure(replace(SORTED, lanes=1)).batch == pytest.approx(1 / 64, rel=0.1)


def test_a_lane_for_each_sample_makes_good_batches_that_are_alike() -> None:
    found = shuffle_quality.measure(SORTED)
    assert found.batch > 0.9  # from 64 random blocks
    # ten batches of the same 64 blocks; 64 of 128 blocks without replacement vary less than 64 of many
    assert found.recent == pytest.approx(1 / 10 * 127 / 64, rel=0.1)


def test_a_wider_window_is_better() -> None:
    shares = [shuffle_quality.measure(replace(SORTED, window=window)).recent for window in (0, 1000)]
    assert shares[1] > 1.5 * shares[0]


def test_classes_that_are_mixed_in_storage_need_no_window() -> None:
    mixed = np.random.default_rng(0).integers(0, 6, SORTED.num_samples)
    found = shuffle_quality.measure(SORTED, mixed)
    assert found.batch > 0.9
    assert found.recent > 0.8
    by_class = np.sort(mixed)
    assert shuffle_quality.measure(SORTED, by_class).recent < 0.3


@pytest.mark.parametrize("plan", [SORTED, replace(SORTED, lanes=1), replace(SORTED, lanes=8, block=5000, window=20)])
def test_advice_holds_when_it_is_followed(plan: TrainPlan) -> None:
    assert not shuffle_quality.measure(plan).is_good
    advised = shuffle_quality.advise(plan)
    assert advised is not None
    better, promised = advised
    assert promised.is_good
    found = shuffle_quality.measure(better)
    assert min(found.batch, found.recent) > 0.8 * shuffle_quality.GOOD_SHARE
    changed = [name for name in ("block", "window") if getattr(better, name) != getattr(plan, name)]
    said = shuffle_quality.describe(plan)
    assert all(f"data.{name} {getattr(better, name)}" in said for name in changed)


def test_a_good_order_is_left_alone() -> None:
    said = shuffle_quality.describe(TrainPlan(64_000, 64, 0, 64, block=2, window=500))
    assert "blocks of 2, window 500, 64 lanes" in said
    assert "poor" not in said


@pytest.mark.parametrize("num_samples", [1, 2, 5, 64])
def test_the_smallest_sets_can_be_measured(num_samples: int) -> None:
    for block in (1, 3, 100):
        found = shuffle_quality.measure(TrainPlan(num_samples, 1, 0, 1, block))
        assert 0 < found.batch <= 1
        assert 0 < found.recent <= 1
