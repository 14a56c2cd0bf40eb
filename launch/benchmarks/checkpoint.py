"""python -m launch.bench checkpoint: the loop's wait for a checkpoint, and the time of a resumed start."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from launch import ROOT
from wasteddp import settings as settings_file
from wasteddp.settings import Settings


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("checkpoint", help="the loop's wait for a save; the start of a resumed run")
    command.set_defaults(run=compare)
    command.add_argument("--config", default="configs/trashnet-scratch-resnet50.yaml", help="settings of the network")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--rounds", type=int, default=7)
    command.add_argument("--starts", type=int, default=0, help="pairs of a fresh and a resumed start; needs the shards")


def compare(arguments: argparse.Namespace) -> None:
    """Run the comparisons that the arguments select."""
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_file.load(arguments.config, [*arguments.set, f"run.out={folder}/run", "model.weights=none"])
        compare_stall(settings, arguments.rounds)
    if arguments.starts:
        compare_starts(arguments.config, arguments.set, arguments.starts)


def compare_stall(settings: Settings, rounds: int) -> None:
    """Time a save, a plain copy of as many bytes, and `torch.save` in turns, and print the medians.

    timm's and torchvision's scripts call `torch.save` in the loop.
    """
    import torch

    from wasteddp.training import build_model, optimizers
    from wasteddp.training.checkpoint.manager import CheckpointManager
    from wasteddp.training.checkpoint.progress import Lineage, Progress
    from wasteddp.training.dataloaders import Inputs
    from wasteddp.training.distributed import startup

    runtime = startup.start_runtime(settings)
    model, _ = build_model.make_network(settings, runtime, tuple("abcdef"))
    optimizer = optimizers.build(model, settings.optimizer)
    model(torch.randn(2, 3, 64, 64, device=runtime.device)).sum().backward()
    optimizer.step()  # so that the optimizer has a state
    manager = CheckpointManager(settings, runtime, cast(Inputs, None), model, optimizer)
    states = [*model.state_dict().values(), *optimizers.state_tensors(optimizer, model).values()]
    num_bytes = sum(tensor.nbytes for tensor in states)
    source = torch.ones(num_bytes // 4, device=runtime.device)
    target = torch.zeros(num_bytes // 4, pin_memory=source.is_cuda)
    lineage = Lineage("0" * 64, (), "", 0, 1, 1, 1, 0, "train", 224, "")
    stalls, copies, writes, others = [], [], [], []
    with manager:
        for step in range(1, rounds + 2):
            began = time.perf_counter()
            target.copy_(source, non_blocking=True)
            if source.is_cuda:
                torch.cuda.synchronize()
            copies.append(1000 * (time.perf_counter() - began))
            manager.save(Progress(lineage, step=step), epoch=0, best=None)
            stalls.append(manager.metrics["checkpoint/stall_ms"])
            began = time.perf_counter()
            manager.wait()
            writes.append(1000 * (time.perf_counter() - began))
            began = time.perf_counter()
            contents = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(contents, Path(settings.run.out) / "other.pth")
            others.append(1000 * (time.perf_counter() - began))
        manager.close()
    runtime.close()
    stall, copy = statistics.median(stalls[1:]), statistics.median(copies[1:])
    print(
        f"{settings.model.arch}, {settings.optimizer.name}, {num_bytes / 1e6:.0f} MB, median of {rounds}: the loop "
        f"waits {stall:.1f} ms (the first time {stalls[0]:.1f}), a copy of as many bytes takes {copy:.1f} ms: "
        f"{stall / copy:.2f} times; it is hashed and on the disk {statistics.median(writes[1:]):.0f} ms later"
    )
    other = statistics.median(others[1:])
    print(
        f"torch.save of the same, as timm's and torchvision's scripts call it in the loop, takes {other:.1f} ms, "
        f"{other / stall:.2f} times as long, and the bytes are not yet on the disk"
    )


def compare_starts(config: str, overrides: list[str], pairs: int) -> None:
    """Time fresh and resumed starts of the real program in turns, from the process's start to its first step."""
    fresh: list[float] = []
    resumed: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        once = Path(folder) / "once"
        _start(config, overrides, once)
        (checkpoint,) = (once / "checkpoints").glob("step-*")
        for number in range(pairs):
            sides = [(fresh, "auto"), (resumed, str(checkpoint))]
            for times, resume in sides if number % 2 else reversed(sides):
                times.append(
                    _start(config, overrides, Path(folder) / f"run-{number}-{len(times)}-{resume[:4]}", resume)
                )
    ratio = statistics.median(resumed) / statistics.median(fresh)
    print(
        f"from the process's start to the end of its first step, median of {pairs}: fresh "
        f"{statistics.median(fresh):.2f} s, resumed {statistics.median(resumed):.2f} s: {ratio:.3f} times"
    )


def _start(config: str, overrides: list[str], out: Path, resume: str = "auto") -> float:
    """Return the seconds until the first line of a step. Then stop the run, which saves."""
    fixed = [f"run.out={out}", "track.wandb=disabled", "train.log_every_steps=1", "evaluate.every_steps=1000000"]
    command = [sys.executable, "wasteddp/train.py", "--config", config, "--resume", resume]
    command += [part for override in [*overrides, *fixed] for part in ("--set", override)]
    began, seconds = time.perf_counter(), 0.0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step ") and not seconds:
                seconds = time.perf_counter() - began
                process.terminate()
    return seconds
