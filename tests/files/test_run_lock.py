"""A run's folder is locked by one training at a time, and the lock ends with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from wasteddp.errors import CheckpointError
from wasteddp.files import RunLock

HOLDER = "import sys, time; from pathlib import Path; from wasteddp.files import RunLock\n"
HOLDER += "c = RunLock(Path(sys.argv[1]), print); print('held', flush=True); time.sleep(60)"


def test_a_second_one_is_refused_with_who_holds_it(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run", print)
    said: list[str] = []
    with pytest.raises(CheckpointError, match=rf"is being written by process {os.getpid()} on .*the 0.2 s"):
        RunLock(tmp_path / "run", said.append, wait_s=0.2)
    assert len(said) == 1
    assert f"waiting for process {os.getpid()}" in said[0]
    first.release()
    first.release()
    RunLock(tmp_path / "run", said.append, wait_s=0).release()


def test_it_waits_for_the_one_before_to_end(tmp_path: Path) -> None:
    first = RunLock(tmp_path, print)
    threading.Timer(0.3, first.release).start()
    RunLock(tmp_path, lambda line: None, wait_s=30).release()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid}"):
            RunLock(tmp_path, lambda line: None, wait_s=0)
        holder.send_signal(signal.SIGKILL)
    RunLock(tmp_path, print, wait_s=0).release()


def test_a_disk_without_locks_is_reported_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    said: list[str] = []
    RunLock(tmp_path, said.append).release()
    assert "cannot be locked (Operation not supported): it is marked as in use by a file instead" in said[0]


def test_a_full_disk_takes_no_lock_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", no_space)
    RunLock(tmp_path, print).release()
