"""The cost of tracking relative to a ResNet50 step: the time in the loop, and the processor time of all of it.

    python -m launch.bench tracking                        W&B as the environment sets it: offline without a key
    WANDB_MODE=disabled python -m launch.bench tracking    only metrics.jsonl, log and terminal

It measures the step of a bare ResNet50 on this machine, and then a loop that sleeps for the time of each step and does
the tracking of a training: a row every `log_every_steps`, and one evaluation with its images. The loop sleeps because
two runs of the same step differ by more than 1 %. The processor time of tracking is counted in this process with its
threads, and in wandb's process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch import ROOT
from launch.benchmarks.step import BARE, one_micro_batch
from wasteddp import settings as settings_file
from wasteddp.data.decoding.decode import encode_jpeg
from wasteddp.parallel import num_usable_cores
from wasteddp.training import messages
from wasteddp.training.distributed import startup
from wasteddp.training.meter import Meter
from wasteddp.training.tracking.pictures import Gallery, Picture
from wasteddp.training.tracking.tracker import RunTracker
from wasteddp.training.tracking.wandb_client import RunIdentity

_LONGEST_SLEEP_S = 0.5  # a limit for slow machines, so that the benchmark ends in time
_CLASSES = ("glass", "paper", "cardboard", "plastic", "metal", "trash")


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("tracking", help="the cost of tracking per step")
    command.set_defaults(run=measure_all)
    command.add_argument(
        "--config", default="configs/trashnet-scratch-resnet50.yaml", help="settings: batch, image size and rows"
    )
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--steps", type=int, default=60)


def measure_all(arguments: argparse.Namespace) -> None:
    """Print the time of a bare step, and the time of tracking in the loop and on the processors."""
    if not sys.platform.startswith("linux"):
        raise SystemExit("error: this benchmark reads processor times from /proc, which only Linux has")
    settings = settings_file.load(arguments.config, arguments.set)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        path.write_text(one_micro_batch(settings, Path(folder)).to_yaml())
        command = [sys.executable, "-m", "launch.benchmarks.step", BARE, str(path), "4", "2"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        step_s = settings.train.batch_size / json.loads(done.stdout.splitlines()[-1])
        print(f"a bare step: {1000 * step_s:.0f} ms ({settings.train.batch_size} images)", flush=True)
        measure(settings, Path(folder) / "run", step_s, arguments.steps)


def measure(settings: settings_file.Settings, folder: Path, step_s: float, steps: int) -> None:
    """Print the cost of tracking `steps` steps in `folder`."""
    runtime = startup.start_runtime(settings)
    began = time.perf_counter()
    identity = RunIdentity(
        "bench", "bench", "wasteddp-bench", "", "", "bench", (), settings.model_dump(mode="json"), _dataset()
    )
    tracker = RunTracker(folder, identity, track=settings.track, total_steps=steps, resumed_step=0)
    print(f"start: {1000 * (time.perf_counter() - began):.0f} ms of the loop", flush=True)
    time.sleep(10)  # W&B starts in its thread meanwhile, which does not count as a cost of steps
    meter, in_loop_s = Meter(runtime.device), 0.0
    evaluated_at = steps // 2 // settings.train.log_every_steps * settings.train.log_every_steps
    loss = torch.ones((), device=runtime.device)
    before_s = _processor_s()
    for step in range(1, steps + 1):
        time.sleep(min(step_s, _LONGEST_SLEEP_S))
        entered = time.perf_counter()
        meter.add(loss)
        meter.step_done()
        tracker.advance(step, f"epoch {step / 55:.1f}")
        if step % settings.train.log_every_steps == 0:
            row = meter.read(runtime, settings.train.batch_size) | {
                "epoch": step / 55,
                "lr": 0.1,
                "train/grad_norm": 1.0,
            }
            tracker.say(messages.progress_line(step, steps, row, better=False))
            if step == evaluated_at:
                tracker.show(step, lambda: _gallery(settings.data.image_size, settings.track.images))
                row |= {f"val/recall/{name}": 0.5 for name in _CLASSES} | {"val/accuracy": 0.5, "val/loss": 1.0}
            tracker.log(step, row)
        in_loop_s += time.perf_counter() - entered
    used_s = _processor_s() - before_s
    began = time.perf_counter()
    tracker.close(0)
    print(f"end: {time.perf_counter() - began:.2f} s")
    print(
        f"time of tracking in the loop: {1000 * in_loop_s / steps:.2f} ms per step, {in_loop_s / steps / step_s:.3%}\n"
        f"processor time of all tracking: {1000 * used_s / steps:.2f} ms per step, "
        f"{used_s / steps / step_s / num_usable_cores():.3%} of the time of {num_usable_cores()} cores"
    )


def _dataset() -> dict[str, object]:
    return {"name": "bench", "uri": "file:///bench", "manifest": "0" * 64, "samples": {}}


def _gallery(side_px: int, count: int) -> Gallery:
    """Return as many encoded images as an evaluation keeps."""
    pixels = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    facts = {"source": "a.jpg", "true": "glass", "predicted": "metal", "probability": 0.9}
    pictures = [Picture(encode_jpeg(pixels, quality=88), facts) for _ in range(count)]
    return Gallery("mistakes", pictures, _CLASSES, np.ones((6, 6), np.int64).tolist())


def _processor_s() -> float:
    """Return the processor time of this process and of its running descendants."""
    return sum(_seconds_of(pid) for pid in _family(os.getpid()))


def _family(pid: int) -> list[int]:
    children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    return [pid, *(member for child in children for member in _family(child))]


def _children(task: Path) -> list[int]:
    return [int(child) for child in (task / "children").read_text().split()]


def _seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
