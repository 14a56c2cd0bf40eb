"""Damaged files are read or refused with a message. `python -m tests.fuzz` tries them for as long as wanted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from trainings import ROOT


@pytest.mark.processes
@pytest.mark.slow
def test_intact_files_are_read_and_damaged_ones_are_read_or_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--check", "--inputs", "60", "--out", str(tmp_path / "found")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "60 inputs in " in done.stdout
    assert " read" in done.stdout.splitlines()[-1]
    assert " refused" in done.stdout.splitlines()[-1]
