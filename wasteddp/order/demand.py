"""When each shard is needed next, according to the plan: which shards to fetch first, and which to evict first.

No files and no clock. A shard is identified by its sha256; steps are numbered from the first one that is taken.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

# How many steps are read ahead at most, to find which shard is needed latest. A shard that is needed later than that
# counts as not needed. A step that was read takes about 40 bytes a sample.
LOOKAHEAD_STEPS = 4096
_AT_ONCE = 32  # steps read while the lock is held, so that other threads do not wait long for it
NEVER = float("inf")


class Demand(Generic[Item]):
    """The coming steps, which are taken one by one, and the shards that they need. Safe for use by many threads.

    A distance is the number of steps until a shard is needed. 0 is the step that is taken next; a negative distance
    means a step that was taken and may still be in use.

    Args:
        steps: each with the shards that it needs.
        others: for each step, the shards that other readers on this machine need then; may end early.
        in_flight: steps that were taken last and may still be in use.
        lookahead: steps that are read ahead, at most.
    """

    def __init__(
        self,
        steps: Iterable[tuple[Item, frozenset[str]]],
        others: Iterable[frozenset[str]] = (),
        *,
        in_flight: int = 0,
        lookahead: int = LOOKAHEAD_STEPS,
    ) -> None:
        self._steps, self._others = iter(steps), iter(others)
        self._in_flight, self._lookahead = in_flight, lookahead
        self._known: deque[tuple[Item, frozenset[str]]] = deque()
        self._position = 0  # steps taken
        self._own_uses, self._other_uses = _Uses(), _Uses()
        self._ended = False
        self._lock = threading.Lock()

    def take(self) -> tuple[Item, frozenset[str]] | None:
        """Take the next step: return it and the shards it needs, or None after the last step."""
        with self._lock:
            self._know(1)
            if not self._known:
                return None
            self._position += 1
            return self._known.popleft()

    def upcoming(self, steps: int) -> list[tuple[float, str]]:
        """Return (distance, shard) for the shards that the steps in flight and the next `steps` need, nearest first."""
        for known in range(_AT_ONCE, steps + _AT_ONCE, _AT_ONCE):
            with self._lock:
                self._know(min(known, steps))
        with self._lock:
            uses = self._own_uses.all_from(self._position - self._in_flight)
            return sorted((at - self._position, shard) for shard, at in uses if at < self._position + steps)

    def distance(self, shard: str) -> float:
        """Return the steps until a reader on this machine needs the shard; `NEVER` if none is known to."""
        known = 0
        while True:
            with self._lock:
                begin = self._position - self._in_flight
                at = min(self._own_uses.next(shard, begin), self._other_uses.next(shard, begin))
                if at < NEVER:
                    return at - self._position
                if self._ended or known >= self._lookahead:
                    return NEVER
                known = min(len(self._known) + _AT_ONCE, self._lookahead)
                self._know(known)

    def _know(self, steps: int) -> None:
        while len(self._known) < steps and not self._ended:
            step = next(self._steps, None)
            if step is None:
                self._ended = True
                return
            number = self._position + len(self._known)
            self._known.append(step)
            self._own_uses.add(number, step[1])
            self._other_uses.add(number, next(self._others, frozenset()))


class _Uses:
    """For each shard, the ranges of steps that need it: [first, last]."""

    def __init__(self) -> None:
        self._runs: dict[str, deque[list[int]]] = {}

    def add(self, step: int, shards: Iterable[str]) -> None:
        for shard in shards:
            runs = self._runs.setdefault(shard, deque())
            if runs and runs[-1][1] == step - 1:
                runs[-1][1] = step
            else:
                runs.append([step, step])

    def next(self, shard: str, begin: int) -> float:
        """Return the first step from `begin` on that needs the shard; `NEVER` if none is known."""
        runs = self._runs.get(shard)
        while runs and runs[0][1] < begin:
            runs.popleft()
        return max(runs[0][0], begin) if runs else NEVER

    def all_from(self, begin: int) -> Iterator[tuple[str, float]]:
        """Yield (shard, first step from `begin` on that needs it) for each shard that is needed again."""
        for shard in list(self._runs):
            at = self.next(shard, begin)
            if at < NEVER:
                yield shard, at
            else:
                del self._runs[shard]
