"""What the ranks tell each other before each step: one small sum, which travels while the step before it is computed.

    batch k+1 arrives -> its sum begins -> step k is launched -> the sum is read -> step k+1 is launched

Each rank tells of a batch only after it has it, so that nobody begins a step that another cannot do. What a rank asks
for, a stop or a save, is heard one step later than it would be by waiting. One process alone waits for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from wasteddp.data.batch import Batch
from wasteddp.training import coverage, signals
from wasteddp.training.copying import one_ahead
from wasteddp.training.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks know before a step, the same on each: the sums of what each knew."""

    stops: bool  # one of them was told to stop, or has no such batch
    saves: bool
    damaged: int
    sums: list[int]  # for coverage


Pending = Callable[[], Agreement]  # all ranks: waits for the others, if they have not all told yet


def agreed(
    batches: Iterator[Batch], world: Runtime, *, seed: int, asks: Callable[[], bool]
) -> Iterator[tuple[Batch, Pending]]:
    """All ranks: each batch, with what the ranks agree on before its step.

    Args:
        batches: of this rank. One that cannot go on ends them with a batch that has a `failure`.
        seed: of the run, for the coverage's hashes.
        asks: whether this rank asks for a save.
    """
    is_ahead = world.world_size > 1  # one process waits for nobody: what is asked for during a step is done after it
    has_asked = False

    def begin(batch: Batch) -> tuple[Batch, Pending]:
        nonlocal has_asked
        # ahead, what was asked for with the last batch is still to be saved, after its step: not twice
        has_asked = asks() and not (is_ahead and has_asked)
        ends = bool(signals.STOP) or batch.failure is not None
        total = world.begin_totals(ends, has_asked, len(batch.damage), *coverage.of(batch, seed))  # all ranks

        def read() -> Agreement:
            stops, saves, damaged, *sums = total()
            return Agreement(stops > 0, saves > 0, damaged, [*sums, damaged])

        return batch, read

    return one_ahead(batches, begin) if is_ahead else map(begin, batches)
