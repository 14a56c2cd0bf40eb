"""The tars of a split: what a reader asks of them, and those that lie in a folder.

`remote_tars` has those behind a URL.
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
ShardsOf = Callable[[I64], frozenset[int]]  # the shards, by number, that samples lie in


class Tars(Protocol):
    """The shards of one split by number, open for reading by many threads."""

    def index(self, number: int) -> Index:
        """The shard's index.

        Raises:
            ShardError: it cannot be had, or is not the one of the manifest.
        """

    def opened(self, number: int) -> AbstractContextManager[int]:
        """The shard's descriptor, waited for where the shard is still to be fetched; valid inside the block.

        Raises:
            as `pread`, and StoppedError: a signal ended the wait.
        """

    @property
    def may_wait(self) -> bool:
        """Whether `opened` may wait for a store, and shards should be let go of soon."""

    def pread(self, number: int, length: int, offset: int) -> bytes:
        """So many bytes from there on; fewer where the tar ends.

        Raises:
            OSError: the disk fails.
            DamagedShardError: there is no such tar.
            RemoteError: the store cannot be reached.
        """

    def renew(self, number: int) -> bool:
        """Whether the shard's bytes were found to be wrong and were replaced, so that reading again may help."""

    def where(self, number: int) -> str:
        """Path or URL, for messages."""

    def ahead(self, steps: Iterable[Step], shards_of: ShardsOf, *, in_flight: int) -> Iterator[Step]:
        """The same steps; what they will read may be brought nearer meanwhile.

        Args:
            in_flight: steps that may still be read from when the last of them is taken.
        """

    def expect(self, others: Iterable[frozenset[str]]) -> None:
        """What else this machine needs (sha256) in the first step that `ahead` will be given, the second, and so on."""

    def close(self) -> None: ...


class LocalTars:
    """Tars in a folder, all opened at once.

    Raises:
        ShardError: one is missing, or has another size than the manifest says.
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
        pass  # all of a folder is there

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
            "copy the whole set again, or make it again with `wasteddp shard`",
        ) from error
    found = os.fstat(descriptor).st_size
    if found != shard.num_bytes:
        os.close(descriptor)
        raise ShardError(
            f"the shard {path} has {found} bytes; the manifest says {shard.num_bytes}",
            "samples would be missing or damaged",
            f"find which with `wasteddp verify {folder}`, then copy the set again or make it again",
        )
    return descriptor
