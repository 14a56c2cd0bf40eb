"""A lock made of files, for file systems without flock (Lustre mounted without it).

Each holder announces itself by a file next to the lock's, PATH.HOST.PID-START.exclusive or .shared, and touches it
every `BEAT_S`. It announces first and looks for others then, so of two that start together at least one sees the other.
The file of a process that has ended on this machine is removed at once. That of another machine is removed after it
was not touched for `STALE_S`: a holder that stops for longer, with its machine, loses the lock.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from wasteddp.errors import storage

BEAT_S = 5.0
STALE_S = 30.0
_NAME = re.compile(r"\.(?P<host>.+)\.(?P<process>\d+-\d+)\.(?P<kind>exclusive|shared)")


class LockFile:
    """A lock at a path. It is held from a successful `take` to `release`."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, threading.Event()
        self._mine: Path | None = None
        self._seen = dict[str, tuple[int, float]]()  # of files of other machines: their time, and since when it is so
        self.is_decided = True  # False: a file of another machine forbids it, and may be stale

    def take(self, *, shared: bool = False) -> bool:
        """Take the lock, without waiting. Return False if another process has it.

        Raises:
            StorageError: the folder cannot be written.
        """
        kind = "shared" if shared else "exclusive"
        mine = self._path.with_name(f"{self._path.name}.{_host()}.{_process(os.getpid())}.{kind}")
        with storage("taking a lock", self._path):
            mine.touch()
            others = [other for other in self._others(mine) if not (shared and other.name.endswith(".shared"))]
            if others:
                mine.unlink()
                return False
        self._mine, self._end = mine, threading.Event()
        threading.Thread(target=_beat, args=(mine, self._end), daemon=True, name="lock").start()
        return True

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        self._end.set()
        if self._mine:
            self._mine.unlink(missing_ok=True)
            self._mine = None

    def _others(self, mine: Path) -> list[Path]:
        """Return the files of other holders that are alive. Remove those of others."""
        alive, self.is_decided = list[Path](), True
        for path in sorted(self._path.parent.glob(f"{self._path.name}.*")):
            found = _NAME.fullmatch(path.name.removeprefix(self._path.name))
            if found is None or path == mine:
                continue
            if found["host"] == _host():
                is_alive = _process(int(found["process"].partition("-")[0])) == found["process"]
            else:
                is_alive = self._is_touched(path)
                self.is_decided &= not is_alive
            if is_alive:
                alive.append(path)
            else:
                path.unlink(missing_ok=True)
        return alive

    def _is_touched(self, path: Path) -> bool:
        try:
            touched_ns = path.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        now = time.monotonic()  # the clocks of two machines differ: only changes of the time count
        before, since = self._seen.get(path.name, (touched_ns, now))
        self._seen[path.name] = touched_ns, since if touched_ns == before else now
        return touched_ns != before or now - since < STALE_S


def _beat(path: Path, end: threading.Event) -> None:
    while not end.wait(BEAT_S):
        with suppress(OSError):
            os.utime(path)


def _host() -> str:
    return socket.gethostname()


def _process(pid: int) -> str:
    """Return a name of a process that no later process has: its number and start. Its start is 0 if it has ended."""
    try:
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        start = "0"
        with suppress(OSError):
            os.kill(pid, 0)
            start = "1" if not Path("/proc/self/stat").exists() else start
    return f"{pid}-{start}"
