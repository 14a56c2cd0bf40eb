"""Output that nobody reads, such as a full pipe or a stopped terminal, holds neither the watchdog nor an exit."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trainings import PROGRAM, config_of


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="the size of a pipe can only be set on Linux")
def test_a_training_whose_output_is_not_read_ends_and_reports_it_in_its_log(small_shards: Path, tmp_path: Path) -> None:
    out, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 4096)
    arguments = [*config_of(tmp_path, small_shards), "--set", "train.epochs=500", "--set", "run.timeout_s=5"]
    process = subprocess.Popen([sys.executable, str(PROGRAM), *arguments], stdout=into, stderr=into)
    os.close(into)
    try:
        assert process.wait(timeout=500) == 70  # far above the usual 25 s
    finally:
        process.kill()
        process.wait()
        os.close(out)
    assert "error: no progress: rank 0" in (tmp_path / "run" / "log.txt").read_text()


def test_a_second_interrupt_ends_a_process_whose_output_is_full() -> None:
    code = (
        "import os, time; from wasteddp.training.watchdog import exits; exits.install_handlers(); "
        "os.write(1, b'ready\\n'); os.set_blocking(2, False)\n"
        "try:\n    while True: os.write(2, b'x' * 512)\nexcept BlockingIOError: os.set_blocking(2, True)\n"
        "os.write(1, b'full\\n'); time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "full\n"]
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(timeout=20) == 130
    process.communicate()
