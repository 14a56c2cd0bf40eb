"""Signals: the first requests a stop, a second SIGINT ends the process, and the launcher's end sends SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ASKED = """
import sys, time
from wasteddp.training.watchdog import exits
exits.install_handlers()
print("ready", flush=True)
while not exits.STOP: time.sleep(0.01)
print(exits.STOP.signal_name, flush=True)
"""

# pbkdf2 computes for minutes in C without the GIL and without handling signals, as a blocked collective
STUCK = """
import hashlib
from wasteddp.training.watchdog import exits
exits.install_handlers()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""

LAUNCHER = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}).wait()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_the_first_signal_asks(name: str) -> None:
    with subprocess.Popen([sys.executable, "-c", ASKED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.Signals[name])
        assert process.stdout.readline() == f"{name}\n"
    assert process.returncode == 0


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_second_sigint_leaves_at_once_even_where_python_cannot_answer(first: str) -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.Signals[first])
        time.sleep(0.2)  # two equal signals at the same moment are delivered as one
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert b"ended immediately; run the same command again" in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_a_launcher_that_dies_stops_the_run(number: signal.Signals) -> None:
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, ASKED], stdout=write) as launcher:
        os.close(write)
        with os.fdopen(read) as said:
            assert said.readline() == "ready\n"
            launcher.send_signal(number)
            assert said.readline() == "SIGTERM\n"


def test_without_a_launcher_the_parents_end_is_nothing(tmp_path: Path) -> None:
    # as with `nohup python wasteddp/train.py &` in a shell that is closed
    variables = {
        key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "TORCHELASTIC_"))
    }
    script = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {ASKED!r}]).pid, flush=True)"
    done = subprocess.Popen([sys.executable, "-c", script], env=variables, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    lines = {done.stdout.readline(), done.stdout.readline()}
    assert done.wait() == 0
    assert "ready\n" in lines
    (pid,) = (int(line) for line in lines - {"ready\n"})
    time.sleep(0.3)
    os.kill(pid, signal.SIGUSR1)  # still running
    assert done.stdout.read() == "SIGUSR1\n"
    done.stdout.close()
