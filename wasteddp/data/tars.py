"""The tars of a split: the interface that a reader uses, in a local folder and at a URL.

Remote tars are read from the cache of this machine, which a `Fetcher` fills.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wasteddp.data.manifest import Index, Shard, parse_index, read_index
from wasteddp.data.remote.folder import Stopped, never
from wasteddp.data.remote.prefetch import Fetcher, NextUses
from wasteddp.errors import DamagedShardError, ShardError
from wasteddp.files import most_files, open_descriptor, read_at
from wasteddp.order.keyed_random import I64

_MOST_OPEN = 4096

Step = tuple[int, int, I64]  # epoch, step in epoch, sample numbers
ShardsOf = Callable[[I64], frozenset[int]]  # numbers of the shards that hold the samples


class Tars(Protocol):
    """The shards of one split by number, open for reading by many threads."""

    def index(self, number: int) -> Index:
        """Return the shard's index.

        Raises:
            ShardError: the index cannot be read, or is not the manifest's.
        """

    def open_shard(self, number: int) -> AbstractContextManager[int]:
        """Return a context with the shard's descriptor, which is valid inside it. Waits until the shard is fetched.

        Raises:
            StoppedError: a signal ended the wait.
            OSError, DamagedShardError, RemoteError: as in `pread`.
        """

    @property
    def may_wait(self) -> bool:
        """Whether `open_shard` may wait for a store; if so, shards should be closed soon after use."""

    def pread(self, number: int, length: int, offset: int) -> bytes:
        """Return `length` bytes from `offset` on; fewer at the end of the tar.

        Raises:
            OSError: the disk fails.
            DamagedShardError: the tar is missing or damaged.
            RemoteError: the store cannot be reached.
        """

    def renew(self, number: int) -> bool:
        """Fetch the shard again if its local copy is damaged; return whether that was done and a new read may help."""

    def where(self, number: int) -> str:
        """Return the shard's path or URL, for messages."""

    def ahead(self, steps: Iterable[Step], shards_of: ShardsOf, *, in_flight: int) -> Iterator[Step]:
        """Yield the same steps; meanwhile, the shards of later steps may be fetched.

        Args:
            steps: to come, in order.
            shards_of: returns the shards that samples need.
            in_flight: steps that were taken last and may still be in use.
        """

    def expect(self, others: Iterable[frozenset[str]]) -> None:
        """Set the shards (sha256) that other readers on this machine need, for each of the steps passed to `ahead`."""

    def close(self) -> None: ...


@dataclass(slots=True)
class _Open:
    descriptor: int
    num_users: int = 0


class LocalTars:
    """Tars in a folder. All are checked at the start.

    They stay open if there are at most `most_open` of them. Otherwise those that were used last do.

    Args:
        folder: of the set.
        shards: of the split.
        most_open: by default, a quarter of the files that the process may open.

    Raises:
        ShardError: a tar is missing, or its size differs from the manifest's.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], *, most_open: int | None = None) -> None:
        self._folder, self._shards = folder, shards
        self._most_open = most_open or most_files(1 / 4, _MOST_OPEN)
        self._lock = threading.Lock()
        self._recent: dict[int, _Open] = {}  # by number, the one that was used last at the end
        self._descriptors: list[int] = []  # by number; empty if there are too many
        try:
            for shard in shards:
                descriptor = _open(folder, shard)
                if len(shards) > self._most_open:
                    os.close(descriptor)
                else:
                    self._descriptors.append(descriptor)
        except ShardError:
            self.close()
            raise

    def index(self, number: int) -> Index:
        return read_index(self._folder, self._shards[number])

    def open_shard(self, number: int) -> AbstractContextManager[int]:
        return nullcontext(self._descriptors[number]) if self._descriptors else self._open_recent(number)

    @property
    def may_wait(self) -> bool:
        return False

    def pread(self, number: int, length: int, offset: int) -> bytes:
        if self._descriptors:
            return read_at(self._descriptors[number], length, offset)
        with self._open_recent(number) as descriptor:
            return read_at(descriptor, length, offset)

    def renew(self, number: int) -> bool:
        return False

    def where(self, number: int) -> str:
        return str(self._folder / self._shards[number].tar)

    def ahead(self, steps: Iterable[Step], shards_of: ShardsOf, *, in_flight: int) -> Iterator[Step]:
        return iter(steps)

    def expect(self, others: Iterable[frozenset[str]]) -> None:
        pass  # a folder needs no fetching

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
        while self._recent:
            os.close(self._recent.popitem()[1].descriptor)

    @contextmanager
    def _open_recent(self, number: int) -> Iterator[int]:
        with self._lock:
            tar = self._recent.pop(number, None)
            if tar is None:
                self._make_room()
                tar = _Open(_open(self._folder, self._shards[number]))
            tar.num_users += 1
            self._recent[number] = tar
        try:
            yield tar.descriptor
        finally:
            with self._lock:
                tar.num_users -= 1

    def _make_room(self) -> None:
        """Close tars until there is room for another, or all are in use."""
        for number in [number for number, tar in self._recent.items() if not tar.num_users]:
            if len(self._recent) < self._most_open:
                return
            os.close(self._recent.pop(number).descriptor)


def _open(folder: Path, shard: Shard) -> int:
    path = folder / shard.tar
    try:
        descriptor = open_descriptor(path)
    except OSError as error:
        is_limit = error.errno in (errno.EMFILE, errno.ENFILE)
        raise DamagedShardError(
            f"the shard {path} cannot be opened: {error.strerror}",
            "its samples would be missing from every epoch",
            "raise the number of files that may be open (ulimit -n)"
            if is_limit
            else "copy the whole set again, or create it again with `wasteddp shard`",
        ) from error
    found = os.fstat(descriptor).st_size
    if found != shard.num_bytes:
        os.close(descriptor)
        raise DamagedShardError(
            f"the shard {path} has {found} bytes; in the manifest it has {shard.num_bytes}",
            "samples would be missing or damaged",
            f"find the damaged samples with `wasteddp verify {folder}`, then copy the set or create it again",
        )
    return descriptor


@dataclass(slots=True)
class _Held:
    descriptor: int
    readers: int = 0


class RemoteTars:
    """Tars at a URL. A shard is held in the cache while a thread reads it or a step in flight may still read it.

    Args:
        shards: of the split.
        fetcher: of the set.
        stopped: once it returns true, `pread` raises StoppedError instead of waiting for a shard.
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
        with self.open_shard(number) as descriptor:
            return read_at(descriptor, length, offset)

    @contextmanager
    def open_shard(self, number: int) -> Iterator[int]:
        with self._lock:
            held = self._held.get(number)
            if held:
                held.readers += 1
        if not held:
            descriptor = self._fetcher.hold(self._shards[number], self._stopped)
            with self._lock:
                held = self._held.setdefault(number, _Held(descriptor))
                held.readers += 1
                if held.descriptor != descriptor:  # another thread has opened it meanwhile
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
                    self._release({number})

    @property
    def may_wait(self) -> bool:
        return True

    def renew(self, number: int) -> bool:
        """Do this at most once for each shard."""
        with self._renewing:
            if number not in self._renewed:
                self._renewed[number] = not self._is_unchanged(number)
                if self._renewed[number]:
                    self._fetcher.drop(self._shards[number])
                    with self._lock:
                        self._release({number})
            return self._renewed[number]

    def where(self, number: int) -> str:
        return self._fetcher.where(self._shards[number].tar)

    def expect(self, others: Iterable[frozenset[str]]) -> None:
        self._others = others

    def ahead(self, steps: Iterable[Step], shards_of: ShardsOf, *, in_flight: int) -> Iterator[Step]:
        def needs() -> Iterator[tuple[Step, frozenset[str]]]:
            for step in steps:
                yield step, frozenset(self._shards[number].sha256 for number in shards_of(step[2]))

        plan = NextUses(needs(), self._others, in_flight=in_flight)
        self._others = ()
        recent: deque[frozenset[str]] = deque(maxlen=in_flight)
        self._fetcher.follow(plan)
        try:
            while taken := plan.take():
                step, needed = taken
                recent.append(needed)
                with self._lock:
                    self._in_flight = frozenset().union(*recent)
                    past = {n for n in self._held if self._shards[n].sha256 not in self._in_flight}
                    self._release({number for number in past if not self._held[number].readers})
                self._fetcher.notify()
                yield step
        finally:
            self._fetcher.unfollow(plan)

    def close(self) -> None:
        with self._lock:
            self._release(set(self._held))

    def _release(self, numbers: Iterable[int]) -> None:
        """Close descriptors; the last reader closes one that is being read. The caller holds the lock."""
        for number in numbers:
            held = self._held.pop(number, None)
            if held and not held.readers:
                os.close(held.descriptor)

    def _is_unchanged(self, number: int) -> bool:
        """Return whether the bytes in the cache are those that the store sent."""
        shard = self._shards[number]
        if self._fetcher.came_damaged(shard):
            return True
        with self.open_shard(number) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
