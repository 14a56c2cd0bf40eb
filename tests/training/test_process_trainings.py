"""Trainings that decode in processes: Ctrl-C, two on one machine, a container without memfd."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from test_worker_kills import decoders
from trainings import PROGRAM, ROOT, config_of, final_weights, launch_command, rows, run_ranks, start_ranks

from wasteddp.errors import EXIT_RESUMABLE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc, and seccomp is Linux's"),
]
TWO = ["--set", "data.workers=2 processes"]
# the training program with a memfd_create that fails, as in a container whose profile does not allow it
WITHOUT_MEMFD = f"""
import ctypes, os, runpy, struct, sys
number = {{"x86_64": 319, "aarch64": 279}}[os.uname().machine]
load, equal, give = 0x20, 0x15, 0x06  # the number of the system call; compare it; answer
code = b"".join(struct.pack("HBBI", *line) for line in (
    (load, 0, 0, 0), (equal, 0, 1, number), (give, 0, 0, 0x50000 | {errno.EPERM}), (give, 0, 0, 0x7FFF0000)))
kept = ctypes.create_string_buffer(code, len(code))
program = struct.pack("HxxxxxxP", 4, ctypes.addressof(kept))
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert prctl(22, 2, program) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP, with this filter
try:
    os.memfd_create("refused")
except PermissionError:
    print("no memfd here", flush=True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def arguments_of(folder: Path, shards: Path, *settings: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    return [*config_of(folder, shards), *TWO, *(word for setting in settings for word in ("--set", setting))]


def leftovers(folder: Path) -> list[str]:
    """Return the processes that have the folder in their arguments, and orphaned decoders."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                words, parent = (process / "cmdline").read_bytes(), (process / "stat").read_text().rsplit(") ", 1)[1]
            except OSError:
                continue
            is_orphan = b"data.decoding import worker" in words and parent.split()[1] == "1"
            if str(folder).encode() in words or is_orphan:
                found.append(f"{process.name} {words!r}")
    return found


@pytest.fixture(scope="module")
def quiet(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of an undisturbed training."""
    folder = tmp_path_factory.mktemp("quiet")
    assert run_ranks(arguments_of(folder, small_shards)).returncode == 0
    return final_weights(folder / "run")


def test_ctrl_c_saves_leaves_no_process_and_the_run_goes_on(small_shards: Path, tmp_path: Path, quiet: bytes) -> None:
    """A terminal sends SIGINT to the launcher, the training, the server and the workers."""
    arguments = arguments_of(tmp_path / "one", small_shards)
    with subprocess.Popen(
        launch_command(arguments),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        metrics = tmp_path / "one" / "run" / "metrics.jsonl"
        while launcher.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.05)
        os.killpg(launcher.pid, signal.SIGINT)
        _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    run = tmp_path / "one" / "run"
    for _ in range(100):  # the launcher does not wait for its processes
        if (run / "RESUMABLE").exists() and not leftovers(tmp_path):
            break
        time.sleep(0.1)
    assert (run / "RESUMABLE").exists(), errors
    assert leftovers(tmp_path) == []
    assert "decoding process" not in errors
    assert 0 < len(rows(run)) < 8
    assert run_ranks(arguments).returncode == 0
    assert final_weights(run) == quiet


def test_two_trainings_on_one_machine_do_not_meet(small_shards: Path, tmp_path: Path, quiet: bytes) -> None:
    """One of them is killed in the middle, while its workers run."""
    folders = [tmp_path / "ended", tmp_path / "killed"]
    [ended], [killed] = (
        start_ranks(arguments_of(folder, small_shards), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for folder in folders
    )
    with ended, killed:
        while killed.poll() is None and not decoders(killed.pid):
            time.sleep(0.05)
        assert not set(decoders(killed.pid)) & set(decoders(ended.pid))
        killed.kill()
        assert ended.wait(timeout=300) == 0
    assert final_weights(tmp_path / "ended" / "run") == quiet
    for _ in range(100):  # a server that was importing torch at the kill notices it after that
        if not leftovers(tmp_path):
            break
        time.sleep(0.1)
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the number of memfd_create is not known")
def test_a_container_without_memfd_trains_the_same(small_shards: Path, tmp_path: Path, quiet: bytes) -> None:
    start = [sys.executable, "-c", WITHOUT_MEMFD, str(PROGRAM), *arguments_of(tmp_path / "one", small_shards)]
    done = forked.run(start)
    assert done.returncode == 0, done.stderr
    assert "no memfd here" in done.stdout
    assert final_weights(tmp_path / "one" / "run") == quiet


def test_a_signal_to_the_training_alone_is_enough(small_shards: Path, tmp_path: Path) -> None:
    """A signal as Slurm and Kubernetes send it."""
    arguments = arguments_of(tmp_path / "one", small_shards)
    [training] = start_ranks(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with training:
        metrics = tmp_path / "one" / "run" / "metrics.jsonl"
        while training.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.05)
        training.send_signal(signal.SIGTERM)
        _, errors = training.communicate(timeout=120)
    assert training.returncode == EXIT_RESUMABLE, errors
    assert leftovers(tmp_path) == []
