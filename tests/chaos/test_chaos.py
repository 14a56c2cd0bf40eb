"""The short form: twenty disturbances of forked ranks, one of torchrun. `python -m tests.chaos` is the long form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def chaos(folder: Path, *arguments: str, ends: str = "every training ended as the undisturbed one") -> str:
    # in its own process, since it forks: pytest may have threads
    command = [sys.executable, "-m", "tests.chaos", *arguments, "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    logs = "".join(path.read_text()[-2000:] for path in folder.glob("*-*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert ends in done.stdout
    return done.stdout


def test_trainings_that_are_killed_and_starved_end_as_undisturbed_ones(tmp_path: Path) -> None:
    assert "20 events in" in chaos(tmp_path, "--kills", "20", "--seed", "7")


@pytest.mark.slow
def test_a_signal_to_one_rank_of_a_real_launcher_saves_all(tmp_path: Path) -> None:
    said = chaos(tmp_path, "--launchers", "1", "--seed", "17")
    assert "| torchrun, two: the last rank | 1 SIGUSR1 | 1 saved and stopped | 0 |" in said
