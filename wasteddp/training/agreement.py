"""What the ranks tell each other before each step: one small sum, which travels while the step before it is computed.

    batch k+1 is there -> sum k is read -> sum k+1 begins -> step k is launched -> batch k+2 is there -> ...

Each rank tells of a batch only after it has it, so that nobody begins a step that another cannot do. What a rank asks
for, a stop or a save, is heard one step later than it would be by waiting. One process alone waits for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from wasteddp.data.batch import Batch
from wasteddp.training import coverage_proof
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.watchdog import signals


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks know before a step, the same on each: the sums of what each knew."""

    stops: bool  # one of them was told to stop, or has no such batch
    saves: bool
    damaged: int
    sums: list[int]  # for coverage


Pending = Callable[[], Agreement]  # all ranks: once for each batch, before its step; waits for those who have not told


def agreed(
    batches: Iterator[Batch], world: Runtime, *, seed: int, asks: Callable[[], bool]
) -> Iterator[tuple[Batch, Pending]]:
    """All ranks: each batch, with what the ranks agree on before its step.

    Args:
        batches: of this rank. One that cannot go on ends them with a batch that has a `failure`.
        seed: of the run, for the coverage's hashes.
        asks: whether this rank asks for a save.
    """

    def begin(batch: Batch, *, may_ask: bool) -> tuple[bool, Callable[[], list[int]]]:
        ends, has_asked = bool(signals.STOP) or batch.failure is not None, may_ask and asks()
        counts = ends, has_asked, len(batch.damage), *coverage_proof.count(batch, seed)
        return has_asked, world.begin_totals(*counts)  # all ranks

    def read(total: Callable[[], list[int]]) -> Agreement:
        stops, saves, damaged, *sums = total()
        return Agreement(stops > 0, saves > 0, damaged, [*sums, damaged])

    def agree(batch: Batch) -> Agreement:
        return read(begin(batch, may_ask=True)[1])

    if world.world_size == 1:  # nobody to wait for: what is asked for during a step is done after it
        for batch in batches:
            yield batch, partial(agree, batch)
        return
    following = next(batches, None)
    if following is None:
        return
    begun = begin(following, may_ask=True)

    def agree_ahead(following: Batch | None) -> Agreement:
        nonlocal begun
        has_asked, total = begun
        agreement = read(total)
        # not after a stop: a rank whose last batch this is would not begin that sum
        if following is not None and not agreement.stops:
            # what was asked for with this batch is still to be saved, after its step: not twice
            begun = begin(following, may_ask=not has_asked)
        return agreement

    while following is not None:
        batch, following = following, next(batches, None)
        yield batch, partial(agree_ahead, following)
