"""A bounded folder of files named by their sha256, shared by the processes of a machine.

    <sha256>            whole: its bytes had that hash when it was renamed to this name
    <sha256>.part       being fetched; its size on the disk is what it will take, so that the bound holds
    <sha256>.damaged    the store's bytes have the right size and another hash: readable sample by sample
    .lock               held while room is made or a name changes

Who uses a file holds a shared flock on it, who fetches or removes it an exclusive one. The kernel lets go of them when
a process dies, so nothing has to be cleaned up after a kill: the next one takes the part over. Nobody waits in the
kernel, where no time limit would reach.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wasteddp.errors import ShardError, StorageError, storage
from wasteddp.files import try_lock

_POLL_S = 0.02
AT_ONCE = -1.0  # what is asked for now may push out all but the steps in flight, whose distance is below 0
_PART, _DAMAGED, _LOCK = ".part", ".damaged", ".lock"

Fetch = Callable[[BinaryIO], str]  # writes the bytes, returns their sha256
Distance = Callable[[str], float]  # how many steps away the next use of a sha256 is; inf: none is known


@dataclass(frozen=True, slots=True)
class Item:
    """A file that is wanted."""

    sha256: str
    num_bytes: int
    name: str  # for messages


@dataclass(frozen=True, slots=True)
class NotYet:
    """Why a file cannot be had now; another value later means that something has moved."""

    why: str
    moment: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    num_bytes: int
    used_ns: int

    @property
    def sha256(self) -> str:
        return self.path.name.partition(".")[0]


class ShardCache:
    """The folder; may be used by many threads and processes.

    Args:
        folder: made if it is not there.
        limit_bytes: that all files together may take.

    Raises:
        StorageError: the folder cannot be made, or its file system has no locks.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._damaged: set[str] = set()  # found by this process: the next run fetches them again
        with storage("making the cache", folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / _LOCK).open("w")
        for part in folder.glob(f"*{_PART}"):
            _removed(part)  # left by a kill: nobody is fetching it
        with lock:
            try:
                try_lock(lock.fileno(), shared=True)
            except OSError as error:
                raise StorageError(
                    f"files in the cache {folder} cannot be locked: {error.strerror}",
                    "a process could remove a shard while another one reads or fetches it",
                    "set data.cache to a folder on a local disk, such as one under /tmp",
                ) from error

    def holds(self, sha256: str) -> bool:
        """Whether it is there now; it may be removed at any time unless it is held."""
        return self._path(sha256).exists()

    def hold(self, item: Item, fetch: Fetch, *, distance: Distance, patience_s: float, look: Callable[[], None]) -> int:
        """A descriptor of the file, fetched if need be; the file stays until the descriptor is closed.

        Args:
            patience_s: how long nothing may move, while another process fetches it or fills the cache.
            look: called while it waits; it raises where nobody waits for the file any longer.

        Raises:
            ShardError: nothing moved; StorageError: the disk; and whatever `fetch` and `look` raise.
        """
        seen, since = None, time.monotonic()
        while isinstance(found := self.try_hold(item, fetch, distance=distance, need=AT_ONCE), NotYet):
            if found != seen:
                seen, since = found, time.monotonic()
            look()
            if time.monotonic() - since > patience_s:
                raise ShardError(
                    f"{item.name} cannot be put into the cache {self.folder}: {found.why}",
                    f"nothing has moved there for {patience_s:.0f} s, and the run would wait for ever",
                    "end other processes that use this cache, or give this run another with data.cache, or raise "
                    "data.cache_gb",
                )
            time.sleep(_POLL_S)
        return found

    def try_hold(self, item: Item, fetch: Fetch, *, distance: Distance, need: float) -> int | NotYet:
        """As `hold`, but does not wait for others.

        Args:
            need: how many steps away the use of this item is; what is needed as soon or sooner is not removed for it.
        """
        while True:
            whole = self._opened(item)
            if whole is not None:
                return whole
            part = self.folder / f"{item.sha256}{_PART}"
            with storage("opening a file of the cache", part):
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not try_lock(descriptor):
                    return NotYet("another process is fetching it", os.fstat(descriptor).st_mtime_ns)
                if not _is(part, descriptor):  # it was finished or removed between our opening and our locking
                    continue
                if self._path(item.sha256).exists():  # finished before our opening, which has made a new part
                    part.unlink()
                    continue
                refused = self._reserve(descriptor, item, distance, need)
                if refused:
                    part.unlink()
                    return refused
                self._fill(part, descriptor, item, fetch)
            finally:
                os.close(descriptor)

    def is_damaged(self, sha256: str) -> bool:
        """Whether it came with another hash, though fetched again and again."""
        return sha256 in self._damaged

    def drop(self, sha256: str) -> None:
        """Removes a file whose bytes are wrong; those who hold it go on reading what they have."""
        self._path(sha256).unlink(missing_ok=True)

    def used_bytes(self) -> int:
        with self._alone():
            return sum(entry.num_bytes for entry in self._entries())

    def _path(self, sha256: str) -> Path:
        return self.folder / (sha256 + (_DAMAGED if sha256 in self._damaged else ""))

    def _opened(self, item: Item) -> int | None:
        """A descriptor with a shared lock, if the file is there."""
        path = self._path(item.sha256)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            with storage("opening a file of the cache", path):
                raise error
        while not try_lock(descriptor, shared=True):  # somebody is about to remove it
            time.sleep(_POLL_S)
        if _is(path, descriptor):
            if os.fstat(descriptor).st_size == item.num_bytes:
                os.utime(descriptor)
                return descriptor
            path.unlink()  # cut by somebody else
        os.close(descriptor)
        return None

    def _fill(self, part: Path, descriptor: int, item: Item, fetch: Fetch) -> None:
        try:
            with storage("filling the cache", self.folder):
                with os.fdopen(descriptor, "r+b", closefd=False) as file:
                    found = fetch(file)
                os.fsync(descriptor)
            if found != item.sha256:
                self._damaged.add(item.sha256)
            with self._alone():  # a listing could see neither name, and room would be given away twice
                part.replace(self._path(item.sha256))
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, part: int, item: Item, distance: Distance, need: float) -> NotYet | None:
        """Makes room and takes it for the part, or says why there is none."""
        with self._alone():
            entries = self._entries()
            used = sum(entry.num_bytes for entry in entries)
            missing = used + item.num_bytes - self.limit_bytes
            if missing > 0:
                for _, entry in sorted(_removable(entries, distance, need), key=lambda pair: pair[0]):
                    missing -= entry.num_bytes if _removed(entry.path) else 0
                    if missing <= 0:
                        break
            if missing > 0:
                return NotYet(
                    f"it takes {item.num_bytes:,} bytes, {missing:,} more than there is room for: "
                    f"{used:,} of {self.limit_bytes:,} bytes are in use"
                )
            with storage("filling the cache", self.folder):
                os.ftruncate(part, item.num_bytes)
            return None

    def _entries(self) -> list[_Entry]:
        found = []
        with storage("looking into the cache", self.folder), os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except FileNotFoundError:  # finished or removed just now
                    continue
                if not entry.name.startswith("."):
                    found.append(_Entry(Path(entry.path), status.st_size, status.st_mtime_ns))
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process and thread at a time; each stays for milliseconds."""
        with storage("locking the cache", self.folder), (self.folder / _LOCK).open("w") as lock:
            while not try_lock(lock.fileno()):
                time.sleep(_POLL_S / 10)
            yield


def _removable(
    entries: list[_Entry], distance: Distance, need: float
) -> Iterator[tuple[tuple[bool, float, int], _Entry]]:
    """What may go, with its place in the order: left-over parts, then what is needed latest, then longest unused."""
    for entry in entries:
        is_part = entry.path.name.endswith(_PART)
        steps = float("inf") if is_part else distance(entry.sha256)
        if steps > need:
            yield (not is_part, -steps, entry.used_ns), entry


def _removed(path: Path) -> bool:
    """Removes a file that nobody uses."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if not try_lock(descriptor) or not _is(path, descriptor):
            return False
        path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
