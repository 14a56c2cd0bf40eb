"""python -m launch.bench checks: the cost of all checks of a training, each timed alone on the real model.

Two timed trainings cannot show a difference below one percent; the time of the checks themselves can be measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, not in __all__

from wasteddp import settings as settings_file
from wasteddp.data.batch import Batch
from wasteddp.settings import Settings
from wasteddp.training import build_model, coverage_proof, optimizers
from wasteddp.training.checkpoint.progress import Lineage, Progress
from wasteddp.training.distributed import startup
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.divergence import Guard
from wasteddp.training.meter import Meter
from wasteddp.training.tracking.journal import Journal
from wasteddp.training.watchdog.failures import Beat, HeartbeatStore

_CLASSES = 6
_BEATS_PER_S = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    name: str
    per_call_s: float
    calls_per_step: float

    @property
    def per_step_s(self) -> float:
        return self.per_call_s * self.calls_per_step


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("checks", help="the cost of all checks of a training, as a share of a step")
    command.set_defaults(run=measure)
    command.add_argument("--config", default="configs/trashnet-scratch-resnet50.yaml")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--rounds", type=int, default=20, help="timed steps; each check is timed ten times as often")


def measure(arguments: argparse.Namespace) -> None:
    """Print a line for each check, and their sum as a share of a step."""
    config, overrides, rounds = arguments.config, arguments.set, arguments.rounds
    settings = settings_file.load(
        config, [*overrides, "train.on_divergence=stop", "track.wandb=disabled", "model.weights=none"]
    )
    runtime = startup.start_runtime(settings)
    model, _ = build_model.make_network(settings, runtime, [str(number) for number in range(_CLASSES)])
    optimizer = optimizers.build(model, settings.optimizer)
    ddp, scaled = runtime.prepare(model, optimizer)
    size, px = settings.train.max_micro_batch or runtime.micro_batch, settings.data.image_size
    images = torch.randn(size, 3, px, px, device=runtime.device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, _CLASSES, (size,), device=runtime.device)

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(ddp(images), labels)
        runtime.accelerator.backward(loss)
        scaled.step()
        scaled.zero_grad()

    step_s = _median_s(step, rounds) * runtime.accumulation
    runtime.accelerator.backward(torch.nn.functional.cross_entropy(ddp(images), labels))  # gradients for the norm
    with tempfile.TemporaryDirectory() as folder:
        costs = _costs(settings, runtime, model, optimizer, step_s=step_s, folder=Path(folder), rounds=10 * rounds)
    total = sum(cost.per_step_s for cost in costs)
    print(f"a step of {settings.model.arch}, {settings.train.batch_size} images of {px} px: {1000 * step_s:.1f} ms")
    for cost in costs:
        print(
            f"  {cost.name:44} {1e6 * cost.per_call_s:9.1f} us, {cost.calls_per_step:.3g} times per step: "
            f"{cost.per_step_s / step_s:.4%}"
        )
    print(f"all checks together: {1e6 * total:.0f} us, {total / step_s:.3%} of a step")


def _costs(
    settings: Settings,
    runtime: Runtime,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step_s: float,
    folder: Path,
    rounds: int,
) -> list[Cost]:
    lineage = Lineage("", tuple("abcdef"), "", 0, 0, 0, 1, 0, "train", 0, "")
    progress, meter = Progress(lineage, covered=[0, 0, 0]), Meter(runtime.device)
    guard = Guard(settings, runtime, model, optimizer, num_classes=_CLASSES, progress=progress)
    samples = np.arange(settings.train.batch_size)
    empty = torch.zeros(0)
    batch = Batch(0, 1, empty, empty, samples, samples, ())
    loss = torch.ones((), device=runtime.device)
    row = {"train/loss": 1.0, "train/grad_norm": 1.0, "epoch": 1.0, "lr": 0.1}
    rows = Journal(folder / "metrics.jsonl", print)
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    board = HeartbeatStore(store, 2)

    def beat() -> None:
        board.post(0, Beat(1, 2, 3, "computing", 0.0))
        board.failure()
        board.beat(0)

    def count() -> None:
        sums = runtime.totals(0, 0, *coverage_proof.count(batch, 0))
        coverage_proof.add(progress.covered, sums[1:], batch)

    def measure() -> None:
        meter.add(loss)
        meter.step_done(guard.step(cast(Any, _Nothing()), meter.step_loss, needs_norm=False).skipped)

    def marks() -> None:
        for _ in runtime.watch.steps(iter([batch]), 0):
            runtime.watch.leave_collective(runtime.watch.enter_collective())

    def report() -> None:
        guard.check(progress, dict(row) | meter.read(runtime, settings.train.batch_size), saves=False)
        rows.append(json.dumps({"step": 1, **row}) + "\n")

    every_row = 1 / settings.train.log_every_steps
    return [
        Cost("heartbeat: marks", _median_s(marks, rounds), 1),
        Cost("heartbeat: the thread, with a real TCPStore", _median_s(beat, rounds), _BEATS_PER_S * step_s),
        Cost("coverage: hash and count of a batch", _median_s(count, rounds), 1),
        Cost("sum of the losses, on the device", _median_s(measure, rounds), 1),
        Cost("finite loss, metrics, writing a row", _median_s(report, rounds), every_row),
        Cost("norm of the gradient", _median_s(lambda: _norm(runtime, model), rounds), every_row),
    ]


class _Nothing:
    """An optimizer whose step takes no time: the timed step already includes it."""

    def clip(self, *, is_asked: bool) -> None:
        pass

    def step(self) -> None:
        pass


def _norm(runtime: Runtime, model: torch.nn.Module) -> None:
    float(runtime.accelerator.clip_grad_norm_(model.parameters(), float("inf")))


def _median_s(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 3):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])
