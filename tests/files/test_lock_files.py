"""Where a file system has no flock, a file marks a folder as in use, and a process that has ended holds nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wasteddp import lock_files
from wasteddp.errors import CheckpointError, ShardError
from wasteddp.files import RunLock
from wasteddp.lock_files import LockFile
from wasteddp.sharding import build

pytestmark = pytest.mark.processes
HOLDER = """
import sys, time
from pathlib import Path
from wasteddp.lock_files import LockFile
print(LockFile(Path(sys.argv[1])).take(shared="shared" in sys.argv), flush=True)
time.sleep(60)
"""


def start_holder(path: Path, *arguments: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), *arguments], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    return holder


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)


@pytest.mark.parametrize(("first", "second", "both"), [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1)])
def test_only_shared_locks_are_held_together(tmp_path: Path, first: int, second: int, both: int) -> None:
    with start_holder(tmp_path / "lock", *["shared"] * first) as holder:
        lock = LockFile(tmp_path / "lock")
        assert lock.take(shared=bool(second)) == bool(both)
        assert lock.is_decided
        lock.release()
        lock.release()
        holder.kill()
    assert lock.take()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_later_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    host = lock_files._host()
    (tmp_path / f"lock.{host}.{os.getpid()}-1.exclusive").touch()
    assert LockFile(tmp_path / "lock").take()


def test_another_machine_holds_it_as_long_as_its_file_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(lock_files.time, "monotonic", lambda: now)
    other, lock = tmp_path / "lock.node-7.cluster.12-345.exclusive", LockFile(tmp_path / "lock")
    other.touch()
    for _ in range(10):
        assert not lock.take()
        assert not lock.is_decided
        now += lock_files.STALE_S - 1
        os.utime(other, ns=(0, int(now * 1e9)))
    assert not lock.take()
    now += lock_files.STALE_S
    assert lock.take()
    assert not other.exists()
    lock.release()


def test_a_holder_touches_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_files, "BEAT_S", 0.01)
    lock = LockFile(tmp_path / "lock")
    assert lock.take()
    (file,) = tmp_path.iterdir()
    os.utime(file, (1, 1))
    for _ in range(3000):
        if file.stat().st_mtime != 1:
            break
        time.sleep(0.01)
    assert file.stat().st_mtime != 1
    lock.release()


@pytest.mark.usefixtures("no_flock")
def test_a_run_is_locked_without_flock(tmp_path: Path) -> None:
    code = "import fcntl\ndef f(*a): raise OSError(38, 'Function not implemented')\nfcntl.flock = f\n"
    code += "import sys, time; from pathlib import Path; from wasteddp.files import RunLock\n"
    code += "c = RunLock(Path(sys.argv[1]), print); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert "marked as in use by a file instead" in holder.stdout.readline()
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"is being written by process {holder.pid}"):
            RunLock(tmp_path, lambda line: None, wait_s=0)
        holder.send_signal(signal.SIGKILL)
    RunLock(tmp_path, lambda line: None, wait_s=0).release()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.usefixtures("no_flock")
def test_the_folder_of_a_set_is_locked_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "set" / build.WORK_NAME
    work.mkdir(parents=True)
    with start_holder(work / "lock") as holder:
        with pytest.raises(ShardError, match="another `wasteddp shard` is writing"), build.work_folder(work.parent):
            pass
        holder.kill()
    monkeypatch.setattr(lock_files, "STALE_S", 0.0)
    (work / "lock.another-node.1-2.exclusive").touch()
    with build.work_folder(work.parent):
        pass
    assert "marked as in use by a file instead" in capsys.readouterr().out
