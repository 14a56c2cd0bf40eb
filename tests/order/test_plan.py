"""The order of samples: each once, the same for every number of ranks and any first step."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wasteddp.data.loader import training_steps
from wasteddp.errors import SettingsError
from wasteddp.order import plan as plans
from wasteddp.order.keyed_random import permute
from wasteddp.order.plan import PADDING, EvaluationPlan, TrainPlan, micro_batch

# Samples of each shard, 97 in total: usual sizes, and sizes that break plans which assign whole shards to ranks.
SHARDS = {
    "one": (97,),
    "of one sample": (1,) * 97,
    "uneven": (0, 1, 60, 3, 33, 0),
    "fewer than ranks": (50, 47),
    "even": (24, 24, 24, 24, 1),
}
ORDERS = [(1, 0), (1, 8), (4, 0), (5, 16), (24, 7), (200, 0), (200, 30)]  # block, window
LANES, GLOBAL_BATCH = 12, 24
grid = pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
orders = pytest.mark.parametrize(("block", "window"), ORDERS)


def plan_of(shards: tuple[int, ...], block: int, window: int, seed: int = 0) -> TrainPlan:
    return TrainPlan(sum(shards), GLOBAL_BATCH, seed, LANES, block, window, shards)


def epoch_samples(plan: TrainPlan, epoch: int) -> np.ndarray:
    return np.concatenate([plan.step_samples(epoch, step) for step in range(plan.steps_per_epoch)])


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@settings(deadline=None)
@given(
    shards=st.lists(st.integers(0, 90), min_size=1, max_size=9),
    lanes=st.integers(1, 12),
    per_lane=st.integers(1, 4),
    block=st.integers(1, 99),
    window=st.integers(0, 30),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**32),
)
def test_an_epoch_sees_each_sample_once_but_those_that_it_names_as_left_out(
    shards: list[int], lanes: int, per_lane: int, block: int, window: int, epoch: int, seed: int
) -> None:
    if sum(shards) < lanes * per_lane:
        return
    plan = TrainPlan(sum(shards), lanes * per_lane, seed, lanes, block, window, tuple(shards))
    seen, left_out = epoch_samples(plan, epoch), plan.left_out_samples(epoch)
    assert len(seen) == plan.steps_per_epoch * plan.global_batch
    assert len(left_out) == plan.left_out_per_epoch < plan.global_batch
    assert np.array_equal(np.sort(np.concatenate([seen, left_out])), np.arange(sum(shards)))


@settings(deadline=None, max_examples=50)
@given(
    shards=st.lists(st.integers(0, 90), min_size=1, max_size=9),
    lanes=st.integers(1, 36),
    block=st.integers(1, 99),
    window=st.integers(0, 30),
    step=st.integers(0, 10**6),
)
def test_ranks_are_disjoint_parts_of_the_same_batch_for_every_number_that_divides_the_lanes(
    shards: list[int], lanes: int, block: int, window: int, step: int
) -> None:
    if sum(shards) < lanes:
        return
    plan = TrainPlan(sum(shards), lanes, 0, lanes, block, window, tuple(shards))
    epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
    whole = plan.step_samples(epoch, step_in_epoch)
    assert len(np.unique(whole)) == lanes
    for world_size in divisors(lanes):
        parts = [plan.step_samples(epoch, step_in_epoch, rank=r, world_size=world_size) for r in range(world_size)]
        assert {len(part) for part in parts} == {lanes // world_size}
        assert np.array_equal(np.concatenate(parts), whole)


@grid
@orders
def test_every_rank_has_the_same_steps_and_no_sample_of_another(
    shards: tuple[int, ...], block: int, window: int
) -> None:
    plan = plan_of(shards, block, window)
    for world_size in divisors(LANES):
        ranks = []
        for rank in range(world_size):
            steps = list(training_steps(plan, 0, plan.steps_per_epoch, rank=rank, world_size=world_size))
            assert [len(samples) for _, _, samples in steps] == [GLOBAL_BATCH // world_size] * plan.steps_per_epoch
            ranks.append(np.concatenate([samples for _, _, samples in steps]))
        together = np.concatenate(ranks)
        assert len(np.unique(together)) == len(together) == plan.steps_per_epoch * GLOBAL_BATCH


@grid
@orders
def test_a_run_resumed_at_any_offset_with_any_number_of_ranks_continues_as_if_uninterrupted(
    shards: tuple[int, ...], block: int, window: int
) -> None:
    last = 3 * plan_of(shards, block, window).steps_per_epoch
    whole = list(training_steps(plan_of(shards, block, window), 0, last, rank=0, world_size=1))
    for first in range(last):
        for world_size in (1, 3, 4):
            resumed = plan_of(shards, block, window)  # a resumed run keeps only the settings and the step
            ranks = [training_steps(resumed, first, last, rank=r, world_size=world_size) for r in range(world_size)]
            for uninterrupted, parts in zip(whole[first:], zip(*ranks, strict=True), strict=True):
                assert {part[:2] for part in parts} == {uninterrupted[:2]}
                assert np.array_equal(np.concatenate([part[2] for part in parts]), uninterrupted[2])


@grid
@orders
def test_epochs_and_seeds_differ(shards: tuple[int, ...], block: int, window: int) -> None:
    plan = plan_of(shards, block, window)
    found = [epoch_samples(plan, epoch).tobytes() for epoch in range(6)]
    found.append(epoch_samples(plan_of(shards, block, window, seed=1), 0).tobytes())
    assert len(set(found)) == 7


def test_two_epochs_agree_no_more_than_chance() -> None:
    plan = TrainPlan(1000, 50, 0, 50)
    # two independent permutations of 1,000 agree in about one place
    assert (epoch_samples(plan, 0) == epoch_samples(plan, 1)).sum() < 10


@pytest.mark.parametrize("block", [1, 8, 25, 100])
def test_every_sample_is_left_out_equally_often(block: int) -> None:
    plan = TrainPlan(100, 48, 0, 48, block, shard_samples=(25, 75))
    times = np.zeros(100)
    for epoch in range(1000):
        times[plan.left_out_samples(epoch)] += 1
    # 4 of 100 samples in 1,000 epochs: each is expected 40 times, with a standard deviation of 6.2
    assert np.abs(times - 40).max() < 5 * 6.2


def test_blocks_keep_neighbours_together() -> None:
    plan = TrainPlan(4096, 64, 0, 1, block=64)
    steps_between = np.diff(epoch_samples(plan, 0))
    assert (steps_between == 1).mean() > 0.95  # 63 of 64
    assert (np.diff(epoch_samples(TrainPlan(4096, 64, 0, 1), 0)) == 1).mean() < 0.01


def test_no_block_spans_two_shards() -> None:
    plan = TrainPlan(97, 1, 0, 1, block=10, shard_samples=SHARDS["uneven"])
    shard_ends = np.cumsum(SHARDS["uneven"])
    for epoch in range(5):
        for part in np.split(epoch_samples(plan, epoch), plan.block_begins(epoch)[1:]):
            assert np.array_equal(part, np.arange(part[0], part[0] + len(part)))
            assert len(part) <= 10
            assert np.searchsorted(shard_ends, part[0], "right") == np.searchsorted(shard_ends, part[-1], "right")


@pytest.mark.parametrize("block", [1, 1000])
def test_a_seek_evaluates_only_what_it_returns(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []

    def counted(position: np.ndarray, *rest: Any) -> np.ndarray:
        evaluated.append(np.size(position))
        return permute(position, *rest)

    monkeypatch.setattr(plans, "permute", counted)
    monkeypatch.setattr(plans, "permute", counted)
    plan = TrainPlan(10**9, 4096 * 64, 0, 4096 * 64, block, shard_samples=(10**7,) * 100)
    assert len(plan.step_samples(50, 2000, rank=1234, world_size=4096)) == 64
    assert sum(evaluated) <= 64 + 1  # the samples and, in block mode, the order's starting point


@pytest.mark.parametrize("block", [1, 1000])
def test_memory_does_not_grow_with_the_number_of_samples(block: int) -> None:
    peaks = []
    for num_samples in (10**6, 10**9):
        plan = TrainPlan(num_samples, 4096, 0, 4096, block, 100, (num_samples // 100,) * 100)
        tracemalloc.start()
        plan.step_samples(50, 7, rank=1234, world_size=4096)
        plan.step_samples(50, 8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_shards_that_do_not_add_up_are_a_fault_of_the_program() -> None:
    with pytest.raises(ValueError, match="the shards have 90 samples, the plan has 100"):
        TrainPlan(100, 10, 0, 10, shard_samples=(50, 40))


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


def test_a_batch_that_the_processes_do_not_divide_names_which_numbers_would_do() -> None:
    with pytest.raises(SettingsError) as caught:
        micro_batch(global_batch=64, world_size=3, max_micro_batch=64)
    assert "train.batch_size is 64 and there are 3 processes" in str(caught.value)
    assert "to 63 or 66, or start 1, 2, 4, 8 processes" in str(caught.value)
