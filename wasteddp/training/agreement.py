"""The agreement of the ranks before each step: one small all-reduce that overlaps with the previous step.

    batch k+1 is loaded -> sum k is read -> sum k+1 is started -> step k is launched -> batch k+2 is loaded -> ...

A rank starts the sum of a batch only after it has loaded the batch, so no rank starts a step that another rank cannot
compute. A request of a rank to stop or to save takes effect one step later than it would with a blocking sum. A single
process needs no sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from wasteddp.data.batch import Batch
from wasteddp.training import coverage_proof
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.watchdog import exits


@dataclass(frozen=True, slots=True)
class Agreement:
    """Sums over the ranks of what each reported for a step; the same on all ranks."""

    stops: bool  # a rank received a stop signal or could not load its batch
    saves: bool
    damaged: int
    sums: list[int]  # for coverage_proof


Pending = Callable[[], Agreement]  # all ranks, once for each batch, before its step; waits for the slower ranks


def agreed(
    batches: Iterator[Batch], runtime: Runtime, *, seed: int, asks: Callable[[], bool]
) -> Iterator[tuple[Batch, Pending]]:
    """Yield each batch with a function that returns the agreement on it. All ranks.

    Args:
        batches: this rank's batches. A rank that fails ends them with a batch that has a `failure`.
        seed: seed of the run, for the hashes of the coverage proof.
        asks: whether this rank requests a save.
    """

    def begin(batch: Batch, *, may_ask: bool) -> tuple[bool, Callable[[], list[int]]]:
        ends, has_asked = bool(exits.STOP) or batch.failure is not None, may_ask and asks()
        counts = ends, has_asked, len(batch.damage), *coverage_proof.count(batch, seed)
        return has_asked, runtime.begin_totals(*counts)  # all ranks

    def read(total: Callable[[], list[int]]) -> Agreement:
        stops, saves, damaged, *sums = total()
        return Agreement(stops > 0, saves > 0, damaged, [*sums, damaged])

    def agree(batch: Batch) -> Agreement:
        return read(begin(batch, may_ask=True)[1])

    if runtime.world_size == 1:  # a request during a step takes effect right after it
        for batch in batches:
            yield batch, partial(agree, batch)
        return
    following = next(batches, None)
    if following is None:
        return
    started = begin(following, may_ask=True)

    def agree_ahead(following: Batch | None) -> Agreement:
        nonlocal started
        has_asked, total = started
        agreement = read(total)
        # not after a stop: a rank without a following batch would not start that sum
        if following is not None and not agreement.stops:
            # a save requested with this batch happens after its step: do not request it twice
            started = begin(following, may_ask=not has_asked)
        return agreement

    while following is not None:
        batch, following = following, next(batches, None)
        yield batch, partial(agree_ahead, following)
