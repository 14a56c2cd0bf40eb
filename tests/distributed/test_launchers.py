"""A signal to the launcher, for each launcher that users have: the run saves and can be resumed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trainings import CPU2, PROGRAM, REAL_PROGRAM, ROOT, config_of, launch, launch_command, rows

from wasteddp.files import RunLock
from wasteddp.training.checkpoint import reader

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def command_of(launcher: str, arguments: list[str]) -> list[str]:
    return {
        "accelerate": launch_command(arguments),
        "accelerate 2": launch_command(arguments, "--config_file", str(CPU2)),
        "torchrun 2": [*TORCHRUN, str(PROGRAM), *arguments],
    }[launcher]


@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        ("accelerate", "SIGTERM"),  # ends only the launcher: the kernel signals the training
        ("accelerate", "SIGINT"),
        ("accelerate 2", "SIGTERM"),  # the launcher passes it on
        ("accelerate 2", "SIGKILL"),
        ("torchrun 2", "SIGINT"),
        ("torchrun 2", "SIGUSR1"),  # ends only the launcher
    ],
)
def test_a_signal_to_the_launcher_saves_the_run(launcher: str, name: str, small_shards: Path, tmp_path: Path) -> None:
    # before the end of the epoch at step 100, only the signal causes a checkpoint
    arguments = [*config_of(tmp_path, small_shards), "--set", "checkpoint.every_steps=0", "--set", "train.epochs=500"]
    arguments += ["--set", "evaluate.every_steps=1000"]
    with subprocess.Popen(command_of(launcher, arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 2/"):
                process.send_signal(signal.Signals[name])
    run = tmp_path / "run"
    RunLock(run / "checkpoints", print).release()  # waits for ranks that outlive their launcher
    assert (run / "RESUMABLE").exists()
    (saved,) = reader.listed(run / "checkpoints")
    assert reader.read(saved).progress.step == rows(run)[-1]["step"] < 1000


def test_a_restart_waits_for_ranks_that_still_save(small_shards: Path, tmp_path: Path) -> None:
    arguments = [*config_of(tmp_path, small_shards), "--set", "train.stop_at_step=6"]
    command = launch_command(arguments, program=REAL_PROGRAM)  # with a report, which takes seconds
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 2/"):
                process.kill()  # the launcher; its rank saves at this time
                break
        done = launch(arguments, program=REAL_PROGRAM)
        process.stdout.read()
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert "attempt 2" in done.stdout
