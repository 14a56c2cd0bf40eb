"""python -m launch.bench train: images/s from shards, compared with the step alone and the training of other programs.

Each side runs in its own process, in turns, with the same images, threads, precision, batch and decoding workers, after
some steps that are not timed:

    wasteddp        the real program, with its proofs, metrics and heartbeat
    bare loop       wasteddp's network and optimizer under Accelerate on one batch in memory: the upper bound
    timm            timm's dataset, loader and step on a folder of the same JPEGs, as in its train.py with
                    --channels-last --amp; crop, flips, colour and erasing of the settings, as far as timm has them
    torchvision     ImageFolder, the transforms of references/classification/presets.py (crop and flip, no colour) and
                    its step, in channels-last, which is faster but not an option of the script

The steps of timm and torchvision are those of `launch.bench step`. The timed steps do not include the end of an epoch,
unless an epoch of the set has fewer steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from launch import ROOT
from launch.benchmarks import step as bench_step
from launch.benchmarks.datasets import unpack
from launch.benchmarks.step import BARE, TIMM, Batches
from wasteddp import settings as settings_file
from wasteddp.data.decoding.workers import default_workers
from wasteddp.errors import EXIT_FINISHED, EXIT_RESUMABLE
from wasteddp.parallel import num_usable_cores
from wasteddp.settings import Settings
from wasteddp.training.distributed import precision
from wasteddp.training.distributed.startup import MOST_UNTRIED

_WARM = _ROW = 10  # steps before the timed ones, and between two rows of the program
OURS = "wasteddp"


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("train", help="training, the step alone, and timm's and torchvision's training")
    command.set_defaults(run=compare)
    command.add_argument("--config", default="configs/trashnet-scratch-resnet50.yaml", help="settings of all sides")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--steps", type=int, default=30, help="timed steps per round, after 10 untimed ones")
    command.add_argument("--sides", default="", help="some of wasteddp, bare loop, timm, torchvision, with commas")


def compare(arguments: argparse.Namespace) -> None:
    """Print a line for each round, then for each side its median and the median of wasteddp relative to it."""
    settings = settings_file.load(arguments.config, arguments.set)
    # for all sides: auto would be measured for wasteddp only
    overrides = [*arguments.set, f"precision={precision.without_measuring(settings.precision)}"]
    overrides += ["model.compile=false"] if settings.model.compile == "auto" else []
    if arguments.steps % _ROW or arguments.steps < _ROW:
        raise SystemExit(f"--steps {arguments.steps}: the rows of the program time its steps: use a multiple of {_ROW}")
    there = [OURS, BARE, *(side for side in OTHERS if side != TIMM or find_spec("timm"))]
    if unknown := {*filter(None, arguments.sides.split(","))} - {OURS, BARE, *OTHERS}:
        raise SystemExit(f"--sides {arguments.sides}: unknown side {', '.join(sorted(unknown))}; see --help")
    sides = [side for side in there if not arguments.sides or side in (OURS, *arguments.sides.split(","))]
    found: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if any(side in OTHERS for side in sides):
            unpack(Path(settings.data.shards), folder / "images", split=settings.data.train_split)
        for number in range(1, arguments.rounds + 1):
            for side in sides if number % 2 else reversed(sides):
                rate = _program if side == OURS else partial(_other, side)
                found[side].append(rate(arguments.config, overrides, arguments.steps, folder))
            print(
                f"round {number}: " + ", ".join(f"{side} {rates[-1]:.1f}" for side, rates in found.items()), flush=True
            )
    print(
        f"\n{settings.model.arch}, {settings.data.image_size} px, batches of {settings.train.batch_size}, from "
        f"{settings.data.shards}; median of {arguments.rounds} rounds of {arguments.steps} steps, in turns\n"
    )
    print(bench_step.table(found, settings.train.batch_size))
    if TIMM not in found and not arguments.sides:
        print("\ntimm is not installed: pip install --no-deps timm")


def _program(config: str, overrides: list[str], steps: int, folder: Path) -> float:
    """Run the real program and stop it by a signal after the steps. Return its images/s without the first row."""
    fixed = [f"run.out={folder / 'run'}", "track.wandb=disabled", f"train.log_every_steps={_ROW}"]
    fixed += [f"evaluate.every_steps={steps + 20}"]  # no evaluation and no checkpoint inside the timed steps
    command = [sys.executable, "wasteddp/train.py", "--config", config]
    command += [part for override in [*overrides, *fixed] for part in ("--set", override)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"step {steps + _WARM}/"):
                process.terminate()
    if process.returncode not in (EXIT_FINISHED, EXIT_RESUMABLE):
        raise SystemExit(process.returncode)  # the program has printed the reason
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    for path in sorted((folder / "run").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    # not the first row: the first ten steps allocate and tune
    steps_ms = [row["train/step_ms"] for row in rows if _WARM < row["step"] <= steps + _WARM]
    return float(settings_file.load(config, overrides).train.batch_size / (statistics.mean(steps_ms) / 1000))


def _other(side: str, config: str, overrides: list[str], steps: int, folder: Path) -> float:
    path = folder / "settings.yaml"
    path.write_text(settings_file.load(config, overrides).to_yaml())
    command = [sys.executable, "-m", "launch.benchmarks.train", side, str(path), str(folder / "images"), str(steps)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def rate(side: str, settings: Settings, images: Path, *, steps: int) -> float:
    """Return the images/s of another side in this process. `images`: a folder of class folders."""
    size = settings.train.max_micro_batch or MOST_UNTRIED
    alone = settings_file.parse(settings.to_yaml(), [f"train.batch_size={size}", "data.lanes=0", "model.weights=none"])
    torch.set_num_threads(settings.run.threads or num_usable_cores())
    with ExitStack() as stack:
        step = OTHERS[side](alone, stack, images) if side in OTHERS else bench_step.SIDES[side](alone, stack)
        return size / bench_step.seconds_per_step(step, steps=steps, warm=_WARM)


# --- other programs: their loaders, and the steps of bench_step -------------------------------------------------------


def _timm(settings: Settings, stack: ExitStack, images: Path) -> bench_step.Step:
    from timm.data import create_dataset, create_loader

    data, augment = settings.data, settings.augment
    has_gpu = torch.cuda.is_available()
    loader = create_loader(
        create_dataset("", root=str(images), is_training=True, batch_size=settings.train.batch_size),
        input_size=(3, data.image_size, data.image_size),
        batch_size=settings.train.batch_size,
        is_training=True,
        re_prob=augment.erase,
        scale=augment.crop_scale,
        ratio=augment.crop_ratio,
        hflip=augment.horizontal_flip,
        vflip=augment.vertical_flip,
        color_jitter=augment.brightness,
        num_workers=_workers(settings),
        pin_memory=has_gpu,
        device=torch.device("cuda" if has_gpu else "cpu"),
        use_prefetcher=has_gpu,  # as in its script, which uses it only on a CUDA device
    )
    return bench_step.timm_step(settings, stack, _endless(loader))


def _torchvision(settings: Settings, stack: ExitStack, images: Path) -> bench_step.Step:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        transforms.RandomResizedCrop(settings.data.image_size, scale=settings.augment.crop_scale, antialias=True),
        transforms.RandomHorizontalFlip(settings.augment.horizontal_flip),
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ]
    loader: Any = torch.utils.data.DataLoader(
        ImageFolder(str(images), transforms.Compose(steps)),
        settings.train.batch_size,
        shuffle=True,
        num_workers=_workers(settings),
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )
    return bench_step.torchvision_step(settings, stack, _endless(loader), channels_last=True)


def _workers(settings: Settings) -> int:
    """Return the number of decoding workers of wasteddp, the number of processes for the other sides."""
    processes, cores = settings.data.uses_processes(device_type()), num_usable_cores()
    return settings.data.num_workers or default_workers(
        cores if processes else settings.run.threads or cores, processes=processes
    )


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _endless(loader: Any) -> Batches:
    while True:
        yield from loader


OTHERS: dict[str, Callable[[Settings, ExitStack, Path], bench_step.Step]] = {TIMM: _timm, "torchvision": _torchvision}


if __name__ == "__main__":
    side, path, images, steps = sys.argv[1:]
    # do not wait for a worker that is still decoding
    print(json.dumps(rate(side, settings_file.load(path), Path(images), steps=int(steps))), flush=True)
    os._exit(0)
