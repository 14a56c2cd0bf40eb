"""A folder of limited size with files that are named by their sha256, shared by the processes of a machine.

    <sha256>            whole: its bytes had that hash when the file was renamed to this name
    <sha256>.part       being fetched; the file has its final size from the start, so that the limit holds
    <sha256>.damaged    the store's bytes have the right size and another hash: readable sample by sample
    .lock               held while room is made or a file is renamed

A process that uses a file holds a shared flock on it. A process that fetches or removes a file holds an exclusive one.
The kernel releases the locks of a process that dies, so a kill needs no cleanup: the next process fetches the part
again. Locks are polled, since no time limit could end a wait in the kernel.

The folder belongs to one user. It is refused if others can write into it, and no link in it is followed.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from wasteddp.errors import ShardError, StorageError, storage
from wasteddp.files import open_descriptor, try_lock

_POLL_S = 0.02
AT_ONCE = -1.0  # an item that is needed now may replace any other except those of steps in flight (distance below 0)
_PART, _DAMAGED, _LOCK = ".part", ".damaged", ".lock"

Fetch = Callable[[BinaryIO], str]  # writes the bytes and returns their sha256
Distance = Callable[[str], float]  # steps until the next use of a sha256; inf: none is known


@dataclass(frozen=True, slots=True)
class Item:
    """A file to fetch."""

    sha256: str
    num_bytes: int
    name: str  # for messages


@dataclass(frozen=True, slots=True)
class NotYet:
    """The reason why a file is not available now. A different value later means that there was progress."""

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
    """The folder. Safe for use by many threads and processes.

    Args:
        folder: created if it does not exist.
        limit_bytes: for all files together.

    Raises:
        StorageError: the folder cannot be created, or its file system has no locks.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._damaged: set[str] = set()  # found by this process; the next run fetches them again
        with storage("creating the cache", folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            _refuse_foreign(folder)
            lock = self._open_lock()
        for part in folder.glob(f"*{_PART}"):
            _remove_unused(part)  # left by a kill: no process is fetching it
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
        """Return whether the file is there now. It may be removed at any time unless it is held."""
        return self._path(sha256).exists()

    def hold(self, item: Item, fetch: Fetch, *, distance: Distance, patience_s: float, look: Callable[[], None]) -> int:
        """Return a descriptor of the file, which is fetched if necessary and stays until the descriptor is closed.

        Args:
            item: the file.
            fetch: writes it.
            distance: of the other files in the cache.
            patience_s: how long to wait without progress while another process fetches the file or fills the cache.
            look: called while this waits; raises if the file is not needed any more.

        Raises:
            ShardError: there was no progress.
            StorageError: the disk fails.
            Exception: any error of `fetch` and `look`.
        """
        seen, since = None, time.monotonic()
        while isinstance(found := self.try_hold(item, fetch, distance=distance, need=AT_ONCE), NotYet):
            if found != seen:
                seen, since = found, time.monotonic()
            look()
            if time.monotonic() - since > patience_s:
                raise ShardError(
                    f"{item.name} cannot be put into the cache {self.folder}: {found.why}",
                    f"there was no progress for {patience_s:.0f} s, and the run would wait forever",
                    "end other processes that use this cache, or give this run another with data.cache, or raise "
                    "data.cache_gb",
                )
            time.sleep(_POLL_S)
        return found

    def try_hold(self, item: Item, fetch: Fetch, *, distance: Distance, need: float) -> int | NotYet:
        """Do as `hold`, but without waiting for other processes.

        Args:
            item: see `hold`.
            fetch: see `hold`.
            distance: see `hold`.
            need: steps until this file is used; files that are needed as soon or sooner are not removed for it.
        """
        while True:
            whole = self._open(item)
            if whole is not None:
                return whole
            part = self.folder / f"{item.sha256}{_PART}"
            with storage("opening a file of the cache", part):
                descriptor = open_descriptor(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                if not try_lock(descriptor):
                    return NotYet("another process is fetching it", os.fstat(descriptor).st_mtime_ns)
                if not _has_name(part, descriptor):  # it was finished or removed between opening and locking
                    continue
                if self._path(item.sha256).exists():  # finished before opening, which created a new part
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
        """Return whether the file had another hash each time it was fetched."""
        return sha256 in self._damaged

    def drop(self, sha256: str) -> None:
        """Remove a file whose bytes are wrong. Processes that hold it can still read it."""
        self._path(sha256).unlink(missing_ok=True)

    def used_bytes(self) -> int:
        with self._locked():
            return sum(entry.num_bytes for entry in self._entries())

    def _path(self, sha256: str) -> Path:
        return self.folder / (sha256 + (_DAMAGED if sha256 in self._damaged else ""))

    def _open(self, item: Item) -> int | None:
        """Return a descriptor with a shared lock, or None if the file does not exist."""
        path = self._path(item.sha256)
        try:
            descriptor = open_descriptor(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            with storage("opening a file of the cache", path):
                raise error
        while not try_lock(descriptor, shared=True):  # another process is removing it
            time.sleep(_POLL_S)
        if _has_name(path, descriptor):
            if os.fstat(descriptor).st_size == item.num_bytes:
                os.utime(descriptor)
                return descriptor
            path.unlink()  # truncated by another program
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
            with self._locked():  # a listing could miss both names, and the same room would be used twice
                part.replace(self._path(item.sha256))
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, part: int, item: Item, distance: Distance, need: float) -> NotYet | None:
        """Make room and reserve it for the part, or return the reason why there is none."""
        with self._locked():
            entries = self._entries()
            used = sum(entry.num_bytes for entry in entries)
            missing = used + item.num_bytes - self.limit_bytes
            if missing > 0:
                for _, entry in sorted(_removable(entries, distance, need), key=lambda pair: pair[0]):
                    missing -= entry.num_bytes if _remove_unused(entry.path) else 0
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
        with storage("listing the cache", self.folder), os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # renamed or removed meanwhile
                    continue
                if not entry.name.startswith("."):
                    found.append(_Entry(Path(entry.path), status.st_size, status.st_mtime_ns))
        return found

    def _open_lock(self) -> IO[bytes]:
        return os.fdopen(open_descriptor(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one thread of one process enter at a time. Each leaves after milliseconds."""
        with storage("locking the cache", self.folder), self._open_lock() as lock:
            while not try_lock(lock.fileno()):
                time.sleep(_POLL_S / 10)
            yield


def _refuse_foreign(folder: Path) -> None:
    """Raise a StorageError if other users could put files or links into the folder."""
    found = folder.stat()
    is_foreign = found.st_uid != os.geteuid() and os.geteuid() != 0
    if is_foreign or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        whose = f"belongs to user {found.st_uid}" if is_foreign else "can be written by other users"
        raise StorageError(
            f"the cache {folder} {whose} (mode {stat.S_IMODE(found.st_mode):o})",
            "they could replace its files, or let links lead to files of yours that would be overwritten",
            f"take the permission away (chmod go-w {folder}), or set data.cache to a folder of your own",
        )


def _removable(
    entries: list[_Entry], distance: Distance, need: float
) -> Iterator[tuple[tuple[bool, float, int], _Entry]]:
    """Yield the files that may be removed, each after its sort key: old parts, latest next use, longest unused."""
    for entry in entries:
        is_part = entry.path.name.endswith(_PART)
        steps = float("inf") if is_part else distance(entry.sha256)
        if steps > need:
            yield (not is_part, -steps, entry.used_ns), entry


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process uses it. Return whether it was removed."""
    try:
        descriptor = open_descriptor(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if not try_lock(descriptor) or not _has_name(path, descriptor):
            return False
        path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _has_name(path: Path, descriptor: int) -> bool:
    """Return whether the open file still has that name."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
