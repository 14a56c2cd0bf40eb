"""Files and locks that survive kills and power cuts. No torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from wasteddp.errors import storage


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or the next start after a kill, sees all of it or the one from before."""
    temporary = path.with_name(path.name + ".tmp")
    with storage("writing", path):
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


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
