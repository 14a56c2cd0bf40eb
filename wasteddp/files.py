"""Files and locks that survive kills and power cuts. No torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from wasteddp.errors import storage


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or the next start after a kill, sees all of it or the one from before."""
    with written_whole(path) as file:
        file.write(content)


@contextmanager
def written_whole(path: Path, *, errors: str | None = None) -> Iterator[IO[Any]]:
    """The same for a file that is written piece by piece; it takes its name when the block ends well.

    An `OSError` of the block itself is passed on as it is: it need not come from this file.

    Args:
        errors: makes it a text file, in UTF-8; what to do with text that UTF-8 does not have.
    """
    temporary = path.with_name(path.name + ".tmp")
    with storage("writing", path):
        file: IO[Any] = (
            temporary.open("w", encoding="utf-8", errors=errors, newline="") if errors else temporary.open("wb")
        )
    try:
        yield file
        with storage("writing", path):
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # closing writes what is left, which fails again on a full disk
            file.close()
        temporary.unlink(missing_ok=True)


@contextmanager
def appended_rows(path: Path) -> Iterator[Callable[[Any], None]]:
    """Takes rows for a file of JSON lines, which are on the disk when the block ends. Ends a line that a kill cut."""
    with storage("writing", path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")

        def append(row: Any) -> None:
            file.write(json.dumps(row).encode() + b"\n")

        yield append
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path, *numbers: str, damaged: Callable[[str], object] = lambda line: None) -> Iterator[Any]:
    """The rows of a file of JSON lines, without lines that are none; a file that is not there has no rows.

    Args:
        numbers: names; with them, a row is an object that has a number for each.
        damaged: takes each line that is no row. A line that a kill cut, or that is being written, has no newline.
    """
    if not path.exists():
        return
    with storage("reading", path), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                if not all(isinstance(row[name], (int, float)) for name in numbers):
                    raise ValueError(line)
            except (ValueError, KeyError, TypeError):
                damaged(line)
            else:
                yield row


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with storage("reading", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Takes the kernel's lock on an open file, without waiting; False: another process has it.

    It ends when the file is closed or the process ends, however that is: no kill can leave it behind.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
