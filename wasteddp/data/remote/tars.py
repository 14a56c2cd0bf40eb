"""The tars of a split that lie behind a URL: read from the cache, which a `Fetcher` fills."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from wasteddp.data.manifest import Index, Shard, parse_index
from wasteddp.data.remote.folder import Stopped, never
from wasteddp.data.remote.prefetch import Fetcher
from wasteddp.data.tars import ShardsOf, Step
from wasteddp.order.demand import Demand


@dataclass(slots=True)
class _Held:
    descriptor: int
    readers: int = 0


class RemoteTars:
    """Shards of one split by number; a shard is held while a step in flight may read it, or a thread does.

    Args:
        shards: of the split.
        fetcher: of the set.
        stopped: once it is true, `pread` waits for no shard: it raises StoppedError.
    """

    def __init__(self, shards: Sequence[Shard], fetcher: Fetcher, stopped: Stopped = never) -> None:
        self._shards, self._fetcher, self._stopped = shards, fetcher, stopped
        self._others: Iterable[frozenset[str]] = ()
        self._held: dict[int, _Held] = {}
        self._in_flight: frozenset[str] = frozenset()
        self._renewed: dict[int, bool] = {}
        self._lock, self._renewing = threading.Lock(), threading.Lock()

    def index(self, number: int) -> Index:
        shard = self._shards[number]
        with os.fdopen(self._fetcher.hold_index(shard), "rb") as file:
            return parse_index(file.read(), shard, self._fetcher.where(shard.index))

    def pread(self, number: int, length: int, offset: int) -> bytes:
        with self.opened(number) as descriptor:
            return os.pread(descriptor, length, offset)

    @contextmanager
    def opened(self, number: int) -> Iterator[int]:
        """As `Tars.opened`: a shard is not closed while one of these blocks has it."""
        with self._lock:
            held = self._held.get(number)
            if held:
                held.readers += 1
        if not held:
            descriptor = self._fetcher.hold(self._shards[number], self._stopped)
            with self._lock:
                held = self._held.setdefault(number, _Held(descriptor))
                held.readers += 1
                if held.descriptor != descriptor:  # another thread was faster
                    os.close(descriptor)
        try:
            yield held.descriptor
        finally:
            with self._lock:
                held.readers -= 1
                is_current = self._held.get(number) is held
                if not held.readers and not is_current:
                    os.close(held.descriptor)
                elif not held.readers and self._shards[number].sha256 not in self._in_flight:
                    self._let_go({number})

    @property
    def may_wait(self) -> bool:
        return True

    def renew(self, number: int) -> bool:
        """Once for each shard: fetches it again, if the bytes in the cache are not those that came."""
        with self._renewing:
            if number not in self._renewed:
                self._renewed[number] = not self._is_as_it_came(number)
                if self._renewed[number]:
                    self._fetcher.drop(self._shards[number])
                    with self._lock:
                        self._let_go({number})
            return self._renewed[number]

    def where(self, number: int) -> str:
        return self._fetcher.where(self._shards[number].tar)

    def expect(self, others: Iterable[frozenset[str]]) -> None:
        self._others = others

    def ahead(self, steps: Iterable[Step], shards_of: ShardsOf, *, in_flight: int) -> Iterator[Step]:
        def needs() -> Iterator[tuple[Step, frozenset[str]]]:
            for step in steps:
                yield step, frozenset(self._shards[number].sha256 for number in shards_of(step[2]))

        demand = Demand(needs(), self._others, in_flight=in_flight)
        self._others = ()
        recent: deque[frozenset[str]] = deque(maxlen=in_flight)
        self._fetcher.follow(demand)
        try:
            while taken := demand.take():
                step, needed = taken
                recent.append(needed)
                with self._lock:
                    self._in_flight = frozenset().union(*recent)
                    past = {n for n in self._held if self._shards[n].sha256 not in self._in_flight}
                    self._let_go({number for number in past if not self._held[number].readers})
                self._fetcher.moved_on()
                yield step
        finally:
            self._fetcher.forget(demand)

    def close(self) -> None:
        with self._lock:
            self._let_go(set(self._held))

    def _let_go(self, numbers: Iterable[int]) -> None:
        """Forgets descriptors; one that is being read from is closed by its last reader. The lock is held."""
        for number in numbers:
            held = self._held.pop(number, None)
            if held and not held.readers:
                os.close(held.descriptor)

    def _is_as_it_came(self, number: int) -> bool:
        shard = self._shards[number]
        if self._fetcher.came_damaged(shard):
            return True
        with self.opened(number) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
