"""A text file that only grows, on a disk that may be full for a while: what cannot be written waits in memory."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path


class Journal:
    """Never raises once it is open: a training is not worth less because a line of its log cannot be written.

    Any thread may append: the loop, the one that saves and the one that waits for W&B all have something to say.

    Args:
        path: of the file; made if missing, otherwise continued.
        warn: takes a message, once each time that writing begins to fail or goes on.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting: deque[bytes] = deque()
        self._fails = False
        self._lock = threading.Lock()

    def append(self, text: str) -> None:
        """Whole or not at all: a line that the disk takes only a part of is taken back, and waits."""
        with self._lock:
            self._waiting.append(text.encode())
            self._write_what_waits(sync=False)

    def sync(self) -> None:
        """Makes what was appended survive a power cut, as far as the disk takes it."""
        with self._lock:
            self._write_what_waits(sync=True)

    def close(self) -> None:
        with self._lock:
            self._write_what_waits(sync=True)
            if self._waiting:
                self._warn(f"{self._path}: {len(self._waiting)} lines could not be written and are lost")
            os.close(self._descriptor)
            self._descriptor = -1  # a thread that comes late is told, and does not write into whatever is opened next

    def _write_what_waits(self, *, sync: bool) -> None:
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
            if sync:
                os.fsync(self._descriptor)
        except OSError as error:
            if not self._fails:
                self._warn(
                    f"WARNING: {self._path} cannot be written: {error.strerror}; its lines wait in memory, training "
                    "goes on: free some space"
                )
            self._fails = True
        else:
            if self._fails:
                self._warn(f"{self._path} can be written again; nothing of it is missing")
            self._fails = False

    def _write(self, line: bytes) -> None:
        before = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            os.ftruncate(self._descriptor, before)
            raise
