"""Short real trainings for the tests: with the launcher of users, or without one and forked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import forked

from wasteddp.training.distributed.launcher import free_port, rank_environment

ROOT = Path(__file__).parents[2]
REAL_PROGRAM = ROOT / "wasteddp" / "train.py"
PROGRAM = ROOT / "tests" / "support" / "narrow.py"  # the same, with a small network
CPU2 = ROOT / "launch" / "accelerate" / "cpu2.yaml"

# 50 images, 4 steps an epoch of 12, one thread: two OpenMP teams on few cores would wait for each other
CONFIG = """
precision: fp32
run: {threads: 1}
data: {image_size: 32}
model: {arch: resnet18, weights: none}
train: {epochs: 2, batch_size: 12, max_micro_batch: 6, log_every_steps: 1}
evaluate: {batch_size: 8}
optimizer: {lr: 0.01}
checkpoint: {every_steps: 1}
track: {wandb: disabled}
"""


def config_of(folder: Path, shards: Path) -> list[str]:
    """Return the arguments of a training in `folder / run`."""
    path = folder / "config.yaml"
    path.write_text(CONFIG)
    return ["--config", str(path), "--set", f"data.shards={shards}", "--set", f"run.out={folder / 'run'}"]


def launch_command(arguments: list[str], *launcher: str, program: Path = PROGRAM) -> list[str]:
    """Return the command of `accelerate launch` with the interpreter of the tests."""
    start = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launcher]
    return [*start, str(program), *arguments]


def launch(
    arguments: list[str], *launcher: str, cwd: Path = ROOT, program: Path = PROGRAM
) -> subprocess.CompletedProcess[str]:
    command = launch_command(arguments, *launcher, program=program)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300)


class Ended(NamedTuple):
    returncode: int  # of the first rank that failed, minus the signal where one killed it; 0 if none did
    stdout: str  # of all
    stderr: str


def start_ranks(arguments: list[str], num: int = 1, *, program: Path = PROGRAM, **how: Any) -> list[forked.Popen]:
    """The program as so many ranks, forked, with the variables that torchrun sets."""
    port, command = free_port(), [sys.executable, str(program), *arguments]
    environments = [os.environ | rank_environment(rank, num, port) for rank in range(num)]
    return [forked.Popen(command, env=environment, cwd=ROOT, **how) for environment in environments]


def run_ranks(arguments: list[str], num: int = 1, *, program: Path = PROGRAM, grace_s: float = 30.0) -> Ended:
    """The same, until all have ended. As with torchrun, a rank that fails ends the others: SIGTERM, and after `grace_s`
    SIGKILL."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        ranks = start_ranks(arguments, num, program=program, stdout=stdout, stderr=stderr)
        until, failed_at, code = time.monotonic() + 300, 0.0, 0
        while any(rank.poll() is None for rank in ranks):
            now = time.monotonic()
            if not failed_at and (failed := [rank for rank in ranks if rank.poll()]):
                failed_at, code = now, failed[0].returncode
                for rank in ranks:
                    rank.terminate()
            if now > until or (failed_at and now > failed_at + grace_s):
                for rank in ranks:
                    rank.kill()
            time.sleep(0.02)
        assert time.monotonic() < until, "it did not end"
        for file in (stdout, stderr):
            file.seek(0)
        return Ended(code or max(rank.wait() for rank in ranks), stdout.read(), stderr.read())


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_weights(run: Path) -> bytes:
    return (sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors").read_bytes()


def kill_all(arguments: list[str]) -> None:
    """Send SIGKILL to every process of a training: torchrun gives each rank its own session."""
    config = arguments[arguments.index("--config") + 1].encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if config in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)


def edit_progress(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the progress of a checkpoint, with its hash, as if it had been written so."""
    progress = json.loads((checkpoint / "progress.json").read_text())
    edit(progress)
    text = json.dumps(progress).encode()
    (checkpoint / "progress.json").write_bytes(text)
    complete = json.loads((checkpoint / "complete.json").read_text())
    complete["sha256"]["progress.json"] = hashlib.sha256(text).hexdigest()
    (checkpoint / "complete.json").write_text(json.dumps(complete))
