"""python -m launch.bench step: the step alone, on a batch in memory, compared with the loops of other programs.

Each side runs in its own process, in turns, with the same images, threads and precision, after some steps that are not
timed. The loops follow the scripts that they are named after, with their models, losses and optimizers, but without
loader, log and schedule:

    wasteddp        the update of train.py on one uint8 batch: augmentation, forward, backward, step, sums
    deterministic   the same with run.deterministic; "wasteddp is" is then the speed without it relative to this
    bare loop       wasteddp's network and optimizer under Accelerate on prepared float images, nothing else
    timm            train_one_epoch of timm's train.py with --channels-last --amp: its ResNet, optimizer and loss
    torchvision     train_one_epoch of references/classification/train.py: an unfused optimizer, the accuracies that it
                    reads back in each step, and the contiguous memory layout, the only one of that script; with
                    channels_last: the same in channels-last
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch import ROOT
from launch.benchmarks.datasets import NUM_CLASSES, drawn_set
from wasteddp import settings as settings_file
from wasteddp.model import networks
from wasteddp.parallel import num_usable_cores
from wasteddp.settings import Settings
from wasteddp.training import optimizers
from wasteddp.training.distributed import precision, startup

OURS, BARE, DETERMINISTIC, TIMM = "wasteddp", "bare loop", "deterministic", "timm"

Step = Callable[[], object]
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # normalised images and labels, on any device


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("step", help="the step alone, compared with timm's and torchvision's loops")
    command.set_defaults(run=compare)
    command.add_argument("--config", default="configs/trashnet-scratch-resnet50.yaml", help="settings of all sides")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--steps", type=int, default=10, help="timed steps of each side in each round")
    command.add_argument("--warm", type=int, default=5, help="steps before the timed ones")
    command.add_argument("--side", action="append", default=[], choices=list(SIDES), help=f"in addition to {OURS}")


def compare(arguments: argparse.Namespace) -> None:
    """Print a line for each side: its median, and the median over the rounds of wasteddp relative to it."""
    asked = [OURS, *arguments.side] if arguments.side else list(SIDES)
    sides = [side for side in SIDES if side in asked and (side != TIMM or find_spec("timm"))]
    found: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        settings = one_micro_batch(settings_file.load(arguments.config, arguments.set), Path(name))
        path = Path(name) / "settings.yaml"
        path.write_text(settings.to_yaml())
        for number in range(arguments.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                command = [sys.executable, "-m", "launch.benchmarks.step", side, str(path)]
                command += [str(arguments.steps), str(arguments.warm)]
                done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
                found[side].append(float(json.loads(done.stdout.splitlines()[-1])))
    images = settings.train.batch_size
    print(
        f"{settings.model.arch}, {images} images of {settings.data.image_size} px in memory, {settings.precision}, "
        f"{settings.optimizer.name}; median of {arguments.rounds} rounds of {arguments.steps} steps, in turns\n"
    )
    print(table(found, images))
    if TIMM in asked and TIMM not in found:
        print("\ntimm is not installed: pip install --no-deps timm")


def table(found: dict[str, list[float]], images: int) -> str:
    """Return a Markdown table of images/s, by side and round; all sides have the same rounds."""
    lines = ["| side | images/s | ms per step | wasteddp is |", "| --- | --- | --- | --- |"]
    for side, rates in found.items():
        rate = statistics.median(rates)
        ratio = statistics.median(ours / theirs for ours, theirs in zip(found[OURS], rates, strict=True))
        lines.append(f"| {side} | {rate:.1f} | {1000 * images / rate:.1f} | {ratio:.3f} of it |")
    return "\n".join(lines)


def one_micro_batch(settings: Settings, folder: Path) -> Settings:
    """Return the settings with a step of one micro-batch on one process, and with a set drawn for it in `folder`."""
    images = min(settings.train.max_micro_batch or settings.train.batch_size, settings.train.batch_size)
    shards = drawn_set(folder, num_images=images, size_px=settings.data.image_size)
    changes = [f"train.batch_size={images}", f"train.max_micro_batch={images}", "data.lanes=0", "model.weights=none"]
    changes += [f"data.shards={shards}", "data.train_split=train", "data.eval_split=val", f"run.out={folder / 'run'}"]
    changes += [f"precision={precision.without_measuring(settings.precision)}"]  # the same on all sides
    return settings_file.parse(settings.to_yaml(), changes)


def rate(side: str, settings: Settings, *, steps: int, warm: int) -> float:
    """Return the images/s of one side in this process."""
    torch.set_num_threads(settings.run.threads or num_usable_cores())
    with ExitStack() as stack:
        return settings.train.batch_size / seconds_per_step(SIDES[side](settings, stack), steps=steps, warm=warm)


def seconds_per_step(step: Step, *, steps: int, warm: int) -> float:
    """Return the mean seconds of `steps` steps after `warm` untimed ones."""
    for number in range(warm + steps):
        if number == warm:
            if _has_gpu():
                torch.cuda.synchronize()
            began = time.perf_counter()
        step()
    if _has_gpu():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


# --- the sides: each returns a step for the settings ------------------------------------------------------------------


def _wasteddp(settings: Settings, stack: ExitStack) -> Step:
    from wasteddp.training import dataloaders
    from wasteddp.training.build_model import build
    from wasteddp.training.checkpoint.progress import Lineage, Progress
    from wasteddp.training.divergence import Guard
    from wasteddp.training.meter import Meter

    runtime = startup.start_runtime(settings)
    data = stack.enter_context(dataloaders.open_inputs(settings, runtime))
    built, meter = build(settings, runtime, data), Meter(runtime.device)
    runtime, ddp, objective, optimizer = built.runtime, built.ddp, built.objective, built.optimizer
    progress = Progress(Lineage.of(settings, data.manifest))
    guard = Guard(settings, runtime, built.model, optimizer.unwrapped, num_classes=NUM_CLASSES, progress=progress)
    batch = next(data.batches(0, 1, runtime))

    def step() -> None:
        guard.begin_step()
        optimizer.begin_step(progress)
        for number, micro in enumerate(runtime.micro_batches(batch, ddp)):
            images_BCHW, targets = objective.inputs(micro, batch.epoch)
            loss = objective.loss(ddp(images_BCHW), targets)
            if number == 0:
                optimizer.zero_grad()
            runtime.accelerator.backward(loss)
            meter.add(loss)
        update = guard.step(optimizer, meter.step_loss, needs_norm=False)
        built.average.update(progress.step, update.skipped)
        meter.step_done(update.skipped)

    return step


def _deterministic(settings: Settings, stack: ExitStack) -> Step:
    stack.callback(torch.set_deterministic_debug_mode, "default")
    return _wasteddp(settings_file.parse(settings.to_yaml(), ["run.deterministic=true"]), stack)


def _bare(settings: Settings, stack: ExitStack) -> Step:
    from accelerate import Accelerator

    asked = settings.precision
    accelerator = Accelerator(cpu=not _has_gpu(), mixed_precision={"fp32": "no"}.get(asked, asked))
    model = networks.build(settings.model.arch, NUM_CLASSES)
    model = model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optimizers.build(model, settings.optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    images, labels = _batch(settings, channels_last=True)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()  # as the program does: see train.py
        accelerator.backward(loss)
        optimizer.step()

    return step


def timm_step(settings: Settings, stack: ExitStack, batches: Batches | None = None) -> Step:
    """Return a step on the given batches; by default on one batch in memory."""
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2

    torch.backends.cudnn.benchmark = True  # as its script does
    asked, smoothing = settings.optimizer, settings.train.label_smoothing
    model = timm.create_model(settings.model.arch, num_classes=NUM_CLASSES).to(_device())
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(
        model, asked.name, lr=asked.lr, weight_decay=asked.weight_decay, momentum=asked.momentum
    )
    criterion = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
    batches = batches or itertools.repeat(_batch(settings, channels_last=True))
    autocast, scaler = _precision(settings)

    def step() -> None:
        images, labels = next(batches)
        images = images.to(_device(), non_blocking=True, memory_format=torch.channels_last)
        with autocast:
            loss = criterion(model(images), labels.to(_device(), non_blocking=True))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def torchvision_step(
    settings: Settings, stack: ExitStack, batches: Batches | None = None, *, channels_last: bool = False
) -> Step:
    """Return a step on the given batches; by default on one batch in memory."""
    torch.backends.cudnn.benchmark = True  # as its script does
    import torchvision

    layout = torch.channels_last if channels_last else torch.contiguous_format
    asked = settings.optimizer
    model: nn.Module = torchvision.models.get_model(settings.model.arch, weights=None, num_classes=NUM_CLASSES)
    model = model.to(device=_device(), memory_format=layout).train()  # type: ignore[call-overload]
    criterion = nn.CrossEntropyLoss(label_smoothing=settings.train.label_smoothing)
    optimizer: torch.optim.Optimizer
    if asked.name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=asked.lr, weight_decay=asked.weight_decay)
    else:  # the script's other optimizers do not match these settings either
        optimizer = torch.optim.SGD(
            model.parameters(), lr=asked.lr, momentum=asked.momentum, weight_decay=asked.weight_decay
        )
    batches = batches or itertools.repeat(_batch(settings, channels_last=channels_last))
    autocast, scaler = _precision(settings)

    def step() -> None:
        images, labels = next(batches)
        images = images.to(_device(), non_blocking=True, memory_format=layout)
        labels = labels.to(_device(), non_blocking=True)
        with autocast:
            output = model(images)
            loss = criterion(output, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        correct = output.topk(5, dim=1).indices == labels[:, None]
        loss.item(), correct[:, :1].sum().item(), correct.sum().item()

    return step


def _torchvision_channels_last(settings: Settings, stack: ExitStack) -> Step:
    return torchvision_step(settings, stack, channels_last=True)


SIDES: dict[str, Callable[[Settings, ExitStack], Step]] = {
    OURS: _wasteddp,
    DETERMINISTIC: _deterministic,
    BARE: _bare,
    TIMM: timm_step,
    "torchvision": torchvision_step,
    "torchvision, channels_last": _torchvision_channels_last,
}


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _device() -> torch.device:
    return torch.device("cuda" if _has_gpu() else "cpu")


def _batch(settings: Settings, *, channels_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images, distributed like normalised ones, and labels, on the device."""
    size, px = settings.train.batch_size, settings.data.image_size
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(size, 3, px, px, device=_device()).contiguous(memory_format=layout)
    return images, torch.randint(0, NUM_CLASSES, (size,), device=_device())


def _precision(settings: Settings) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """Return the scripts' autocast and scaler for the precision; they do nothing if it needs none."""
    dtype = torch.float16 if settings.precision == "fp16" else torch.bfloat16
    kind = _device().type
    return (
        torch.autocast(kind, dtype, enabled=settings.precision != "fp32"),
        torch.amp.GradScaler(kind, enabled=settings.precision == "fp16"),
    )


if __name__ == "__main__":
    side, path, steps, warm = sys.argv[1:]
    print(json.dumps(rate(side, settings_file.load(path), steps=int(steps), warm=int(warm))))
