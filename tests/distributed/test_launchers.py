"""What a signal to the launcher does to the run, with the launchers that users have: it saves, and can go on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trainings import CPU2, PROGRAM, REAL_PROGRAM, ROOT, config_of, launch, launch_command, rows

from wasteddp.training.checkpoint import files
from wasteddp.training.checkpoint.run_lock import RunLock

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
        ("accelerate", "SIGTERM"),  # ends the launcher alone: the kernel tells the training
        ("accelerate", "SIGINT"),
        ("accelerate 2", "SIGTERM"),  # passed on
        ("accelerate 2", "SIGKILL"),
        ("torchrun 2", "SIGINT"),
        ("torchrun 2", "SIGUSR1"),  # ends the launcher alone
    ],
)
def test_a_signal_to_the_launcher_saves_the_run(launcher: str, name: str, small_shards: Path, tmp_path: Path) -> None:
    # the only checkpoint before the end of the epoch, step 100, is that of the signal
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
    (saved,) = files.listed(run / "checkpoints")
    assert files.read(saved).progress.step == rows(run)[-1]["step"] < 1000


def test_a_restart_waits_for_ranks_that_still_save(small_shards: Path, tmp_path: Path) -> None:
    arguments = [*config_of(tmp_path, small_shards), "--set", "train.stop_at_step=6"]
    command = launch_command(arguments, program=REAL_PROGRAM)  # with a report, which takes seconds
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 2/"):
                process.kill()  # the launcher: its rank saves meanwhile
                break
        done = launch(arguments, program=REAL_PROGRAM)
        process.stdout.read()
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert "attempt 2" in done.stdout
