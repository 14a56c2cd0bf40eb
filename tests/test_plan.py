"""The order of samples: once each, the same for every number of ranks, from any place."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wasteddp.data.plan import PADDING, EvaluationPlan, TrainPlan, micro_batch
from wasteddp.errors import SettingsError


def epoch_samples(plan: TrainPlan, epoch: int) -> np.ndarray:
    return np.concatenate([plan.step_samples(epoch, step) for step in range(plan.steps_per_epoch)])


@settings(deadline=None)
@given(
    num_samples=st.integers(1, 500),
    lanes=st.integers(1, 12),
    per_lane=st.integers(1, 4),
    block=st.integers(1, 20),
    window=st.integers(0, 30),
    epoch=st.integers(0, 5),
)
def test_an_epoch_sees_no_sample_twice_and_leaves_out_less_than_a_batch(
    num_samples: int, lanes: int, per_lane: int, block: int, window: int, epoch: int
) -> None:
    if num_samples < lanes * per_lane:
        return
    plan = TrainPlan(num_samples, lanes * per_lane, 3, lanes, block, window)
    seen = epoch_samples(plan, epoch)
    assert len(np.unique(seen)) == len(seen) == plan.steps_per_epoch * plan.global_batch
    assert seen.min() >= 0
    assert seen.max() < num_samples
    assert num_samples - len(seen) == plan.left_out_per_epoch < plan.global_batch


@pytest.mark.parametrize(("block", "window"), [(1, 0), (8, 0), (8, 16)])
@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12, 24])
def test_a_step_has_the_same_samples_in_the_same_order_for_every_number_of_ranks(
    world_size: int, block: int, window: int
) -> None:
    plan = TrainPlan(1000, 48, 0, 24, block, window)
    for step in (0, 7, 19):
        parts = [plan.step_samples(2, step, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert {len(part) for part in parts} == {48 // world_size}
        assert np.array_equal(np.concatenate(parts), plan.step_samples(2, step))


def test_epochs_and_seeds_differ() -> None:
    plan = TrainPlan(1000, 50, 0, 50)
    orders = [epoch_samples(plan, 0), epoch_samples(plan, 1), epoch_samples(TrainPlan(1000, 50, 1, 50), 0)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        # two independent permutations of 1,000 agree in about one place
        assert (orders[a] == orders[b]).sum() < 10


def test_what_an_epoch_leaves_out_is_another_remainder_each_time() -> None:
    for block in (1, 8):
        plan = TrainPlan(100, 48, 0, 48, block)
        left_out = [frozenset(range(100)) - frozenset(epoch_samples(plan, epoch).tolist()) for epoch in range(40)]
        assert {len(samples) for samples in left_out} == {4}
        assert len(set(left_out)) > 20
        assert len(frozenset().union(*left_out)) > 60


def test_blocks_keep_neighbours_together() -> None:
    plan = TrainPlan(4096, 64, 0, 1, block=64)
    steps_between = np.diff(epoch_samples(plan, 0))
    assert (steps_between == 1).mean() > 0.95  # 63 of 64
    assert (np.diff(epoch_samples(TrainPlan(4096, 64, 0, 1), 0)) == 1).mean() < 0.01


def test_a_rank_of_4096_seeks_into_a_billion_samples_in_milliseconds() -> None:
    plan = TrainPlan(10**9, 4096, 0, 4096)
    began = time.perf_counter()
    plan.step_samples(50, 200_000, rank=1234, world_size=4096)
    assert time.perf_counter() - began < 1.0  # 0.3 ms; the bound only catches a plan that walks or stores


@given(num_samples=st.integers(0, 300), batch=st.integers(1, 40), world_size=st.integers(1, 7))
def test_evaluation_counts_each_sample_once_on_equally_many_batches(
    num_samples: int, batch: int, world_size: int
) -> None:
    plan = EvaluationPlan(num_samples, batch)
    seen = np.concatenate(
        [
            plan.batch_samples(number, rank=rank, world_size=world_size)
            for rank in range(world_size)
            for number in range(plan.num_batches(world_size))
        ]
        or [np.zeros(0, np.int64)]
    )
    assert sorted(seen[seen != PADDING].tolist()) == list(range(num_samples))
    assert len(seen) - num_samples < batch * world_size


def test_fewer_samples_than_a_batch_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"10 samples and train.batch_size is 16(.|\n)*to 10 or less"):
        TrainPlan(10, 16, 0, 16)


def test_lanes_that_ranks_do_not_divide_are_refused() -> None:
    with pytest.raises(SettingsError, match="3 processes and 8 lanes"):
        TrainPlan(100, 8, 0, 8).step_samples(0, 0, world_size=3)


@pytest.mark.parametrize(
    ("global_batch", "world_size", "largest", "expected"),
    [(64, 1, 64, (64, 1)), (64, 1, 32, (32, 2)), (64, 2, 32, (32, 1)), (64, 2, 24, (16, 2)), (7, 1, 4, (1, 7))],
)
def test_micro_batch_is_the_largest_allowed_divisor(
    global_batch: int, world_size: int, largest: int, expected: tuple[int, int]
) -> None:
    assert micro_batch(global_batch=global_batch, world_size=world_size, max_micro_batch=largest) == expected


def test_a_batch_that_the_processes_do_not_divide_says_which_numbers_would_do() -> None:
    with pytest.raises(SettingsError) as caught:
        micro_batch(global_batch=64, world_size=3, max_micro_batch=64)
    assert "train.batch_size is 64 and there are 3 processes" in str(caught.value)
    assert "to 63 or 66, or start 1, 2, 4, 8 processes" in str(caught.value)
