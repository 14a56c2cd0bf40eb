"""The tars of a split: the interface that a reader uses, and its implementation for a local folder.

`remote.tars` has the implementation for a URL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from wasteddp.data.manifest import Index, Shard, read_index
from wasteddp.errors import ShardError
from wasteddp.order.keyed_random import I64

Step = tuple[int, int, I64]  # epoch, step in epoch, sample numbers
ShardsOf = Callable[[I64], frozenset[int]]  # numbers of the shards that hold the samples


class Tars(Protocol):
    """The shards of one split by number, open for reading by many threads."""

    def index(self, number: int) -> Index:
        """Return the shard's index.

        Raises:
            ShardError: the index cannot be read, or is not the manifest's.
        """

    def opened(self, number: int) -> AbstractContextManager[int]:
        """Return a context with the shard's descriptor, which is valid inside it. Waits until the shard is fetched.

        Raises:
            StoppedError: a signal ended the wait.
            OSError, DamagedShardError, RemoteError: as in `pread`.
        """

    @property
    def may_wait(self) -> bool:
        """Whether `opened` may wait for a store; if so, shards should be closed soon after use."""

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


class LocalTars:
    """Tars in a folder, all opened at the start.

    Raises:
        ShardError: a tar is missing, or its size differs from the manifest's.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder, self._shards = folder, shards
        self._descriptors: list[int] = []
        try:
            for shard in shards:
                self._descriptors.append(_open(folder, shard))
        except ShardError:
            self.close()
            raise

    def index(self, number: int) -> Index:
        return read_index(self._folder, self._shards[number])

    def opened(self, number: int) -> AbstractContextManager[int]:
        return nullcontext(self._descriptors[number])

    @property
    def may_wait(self) -> bool:
        return False

    def pread(self, number: int, length: int, offset: int) -> bytes:
        return os.pread(self._descriptors[number], length, offset)

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


def _open(folder: Path, shard: Shard) -> int:
    path = folder / shard.tar
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ShardError(
            f"the shard {path} cannot be opened: {error.strerror}",
            "its samples would be missing from every epoch",
            "copy the whole set again, or create it again with `wasteddp shard`",
        ) from error
    found = os.fstat(descriptor).st_size
    if found != shard.num_bytes:
        os.close(descriptor)
        raise ShardError(
            f"the shard {path} has {found} bytes; in the manifest it has {shard.num_bytes}",
            "samples would be missing or damaged",
            f"find the damaged samples with `wasteddp verify {folder}`, then copy the set or create it again",
        )
    return descriptor
