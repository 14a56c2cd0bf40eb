"""The ranks' agreement is started one batch ahead, and applies to the batch that it was started with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from wasteddp.data.batch import Batch, Damage
from wasteddp.errors import ShardError
from wasteddp.training import coverage_proof
from wasteddp.training.agreement import agreed
from wasteddp.training.watchdog import exits

SEED = 7


def batch(number: int) -> Batch:
    samples = np.array([2 * number, 2 * number + 1], np.int64)
    return Batch(0, number, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), samples, samples, ())


@dataclass
class World:
    """A runtime of two ranks, in which the other rank does the same as this one; `events` has the calls in order."""

    world_size: int = 2
    other_ends_at: int = -1  # the batch that the other rank lacks
    events: list[str] = field(default_factory=list)
    begun: int = 0

    def begin_totals(self, *counts: int) -> Callable[[], list[int]]:
        number, totals = self.begun, [self.world_size * count for count in counts]
        totals[0] += number == self.other_ends_at
        self.begun += 1
        self.events.append(f"begin {number}")

        def finish() -> list[int]:
            self.events.append(f"read {number}")
            return totals

        return finish


def loop(runtime: World, batches: Iterator[Batch], asks: Callable[[], bool] = lambda: False) -> list[Any]:
    """Return the agreement before each step."""
    results = []
    for number, (_, agree) in enumerate(agreed(batches, runtime, seed=SEED, asks=asks)):  # type: ignore[arg-type]
        results.append(agree())
        runtime.events.append(f"step {number}")
    return results


def test_the_next_sum_travels_while_a_step_is_computed() -> None:
    runtime = World()
    loop(runtime, map(batch, range(3)))
    assert runtime.events == [
        "begin 0",
        *("read 0", "begin 1", "step 0"),
        *("read 1", "begin 2", "step 1"),
        *("read 2", "step 2"),
    ]


def test_each_step_gets_the_sum_of_its_own_batch() -> None:
    damaged = replace(batch(1), damage=(Damage(2, "a.tar", "cut off", replaced_by=9),))
    results = loop(World(), iter([batch(0), damaged, batch(2)]))
    assert [result.damaged for result in results] == [0, 2, 0]
    for item, result in zip([batch(0), damaged, batch(2)], results, strict=True):
        count, digest = coverage_proof.count(item, SEED)
        assert result.sums == [2 * count, 2 * digest, result.damaged]
    assert not any(result.stops for result in results)


def test_a_rank_without_a_batch_stops_all_before_its_step_and_after_the_one_before() -> None:
    runtime = World()
    last = Batch.failed(ShardError("a.tar is gone", "no batch", "copy it again"))
    results = loop(runtime, iter([batch(0), batch(1), last]))
    assert [result.stops for result in results] == [False, False, True]
    assert runtime.events.index("step 1") > runtime.events.index("begin 2")  # agreed before the step, but not too early


def test_ranks_that_stop_have_begun_as_many_sums_each() -> None:
    """An additional sum on one rank would be matched with the next sum of the other."""
    last = Batch.failed(ShardError("a.tar is gone", "no batch", "copy it again"))
    failing, other = World(), World(other_ends_at=2)
    for runtime, batches in ((failing, iter([batch(0), batch(1), last])), (other, map(batch, range(9)))):
        for _, agree in agreed(batches, runtime, seed=SEED, asks=bool):  # type: ignore[arg-type]
            if agree().stops:
                break
    assert failing.begun == other.begun == 3


@pytest.mark.parametrize(("world_size", "stops"), [(1, [False, True, True, True]), (2, [False, False, True, True])])
def test_a_signal_is_handled_at_the_next_step_or_with_several_ranks_at_the_one_after_it(
    world_size: int, stops: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_told = False
    monkeypatch.setattr(exits, "STOP", type("Stop", (), {"__bool__": lambda _: is_told})())
    results = []
    for _, agree in agreed(map(batch, range(4)), World(world_size), seed=SEED, asks=bool):  # type: ignore[arg-type]
        results.append(agree().stops)
        is_told = True  # during the first step
    assert results == stops


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_request_is_one_save(world_size: int) -> None:
    """The request remains until the save, which follows the step that all ranks agreed on."""
    wants: list[int] = []
    saved = []
    steps = agreed(map(batch, range(8)), World(world_size), seed=SEED, asks=lambda: bool(wants))  # type: ignore[arg-type]
    for step, (_, agree) in enumerate(steps):
        if agree().saves:
            saved.append(step)
            wants.clear()
        if step in (1, 4):
            wants.append(step)
    assert saved == ([2, 5] if world_size == 1 else [3, 6])
