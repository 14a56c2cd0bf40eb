"""The short form: twenty disturbances, forked; the long form is `python -m tests.chaos`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_trainings_that_are_killed_and_starved_end_as_undisturbed_ones(tmp_path: Path) -> None:
    # a process of its own, since it forks: here pytest may have threads
    command = [sys.executable, "-m", "tests.chaos", "--kills", "20", "--seed", "7", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("disturbed-*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "20 events in" in done.stdout
    assert "every training ended as the undisturbed one" in done.stdout
