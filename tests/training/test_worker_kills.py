"""Decoding processes are killed at random: the training ends with the weights of an undisturbed one, bit for bit.

WASTEDDP_KILLS=100 pytest tests/training/test_worker_kills.py sets the number of kills; the default is 8.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trainings import PROGRAM, config_of, final_weights, launch

KILLS = int(os.environ.get("WASTEDDP_KILLS", "8"))


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def decoders(training: int) -> list[int]:
    """Return the workers of a training, which are children of its server."""
    servers = []
    for child in children(training):
        try:
            if b"data.decoding import worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                servers.append(child)
        except OSError:
            continue
    return [worker for server in servers for worker in children(server) if is_alive(worker)]


def is_alive(pid: int) -> bool:
    """False for a process that was killed and not yet reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_killed_workers_change_nothing(small_shards: Path, tmp_path: Path) -> None:
    epochs = KILLS // 3 + 2  # of four steps, with about one kill per step
    often = ["--set", f"train.epochs={epochs}", "--set", "checkpoint.every_steps=0", "--set", "evaluate.every_steps=40"]
    (tmp_path / "quiet").mkdir()
    (tmp_path / "killed").mkdir()
    quiet = config_of(tmp_path / "quiet", small_shards) + often
    assert launch([*quiet, "--set", "data.workers=1 threads"]).returncode == 0
    killed = [*config_of(tmp_path / "killed", small_shards), *often, "--set", "data.workers=3 processes"]
    chance, kills = random.Random(0), 0
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), *killed], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as training:
        seen, metrics = 0, tmp_path / "killed" / "run" / "metrics.jsonl"
        while training.poll() is None and kills < KILLS:
            time.sleep(0.01)
            done = metrics.read_text().count("\n") if metrics.exists() else 0
            if done > seen and (workers := decoders(training.pid)):
                seen = done
                os.kill(chance.choice(workers), signal.SIGKILL)
                kills += 1
        _, errors = training.communicate(timeout=300)
    assert training.returncode == 0, errors
    assert kills == KILLS
    # three for training and three for evaluation: a killed idle worker may stay unnoticed until the end
    deaths = re.findall(r"warning: rank 0: decoding process \d+ .* a new one replaces it", errors)
    assert KILLS - 6 <= len(deaths) <= KILLS
    ours, others = (final_weights(tmp_path / name / "run") for name in ("killed", "quiet"))
    assert ours == others
