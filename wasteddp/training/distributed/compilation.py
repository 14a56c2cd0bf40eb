"""Whether the network of a run is compiled: as set, as when the run began, or where it saves more than it costs."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sysconfig
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from wasteddp.errors import SettingsError
from wasteddp.model import resnet
from wasteddp.order.plan import TrainPlan
from wasteddp.settings import Settings
from wasteddp.training import schedule
from wasteddp.training.distributed.runtime import Runtime

# Source: one H200, torch 2.11, ResNet50 at 224 px (docs/notes.md): images/s compiled over those without, and the
# seconds that the first step took. An estimate for other cards and networks, so it must save some times its cost.
_GAIN = {"bf16": 6518 / 4574, "fp16": 6912 / 5871}
_SECONDS_A_GRAPH = 62.0
_LEAST_RETURN = 2.0


@dataclass(frozen=True, slots=True)
class Decision:
    compiles: bool
    reason: str


def choose(settings: Settings, world: Runtime, plan: TrainPlan) -> Runtime:
    """All ranks: what is known before the network is made, with whether it is compiled.

    Raises:
        SettingsError: model.compile is true and this machine has no compiler for it; on every rank.
    """
    is_gpu = world.device.type == "cuda"
    lacking = what_is_lacking() if is_gpu else ""
    if settings.model.compile is True:
        with world.together():
            refuse_without_compiler(lacking)
    work = Work.of(settings, plan.steps_per_epoch, settings.train.batch_size // world.world_size)
    decision = decide(
        settings.model.compile,
        kept=world.kept.compiles,
        gain=_GAIN.get(world.precision, 1.0) if is_gpu else 1.0,
        work=work,
        images_per_s=world.images_per_s,
        is_deterministic=settings.run.deterministic,
        lacking=next(filter(None, world.gather(lacking)), ""),  # all ranks
    )
    if decision.compiles and is_gpu:  # on a CPU a start that is killed can leave a library that is half written
        keep_compiled_code()
    return replace(world, compiles=decision.compiles, compile_reason=decision.reason)


def decide(
    asked: bool | str,
    *,
    kept: bool | None,
    gain: float,
    work: Work,
    images_per_s: float,
    lacking: str,
    is_deterministic: bool = False,
) -> Decision:
    """Whether to compile for True, False or "auto".

    Args:
        kept: what the checkpoint says that the run goes on from.
        gain: images/s compiled over those without; 1: none is known.
        images_per_s: of this process, at the full side and not compiled; 0: unknown.
        lacking: what this machine has not that compiling needs; "": nothing.
    """
    if asked != "auto":
        return Decision(bool(asked), "as set")
    if lacking:
        return Decision(False, lacking)
    if kept is not None:
        return Decision(kept, "as when the run began")
    if is_deterministic:
        return Decision(False, "run.deterministic is set, and an estimate hangs on what was measured")
    if gain <= 1:
        return Decision(False, "no gain is known for this device and precision")
    if not images_per_s:
        return Decision(False, "there was too little free memory to measure what it would save")
    cost_s, all_s = work.num_graphs * _SECONDS_A_GRAPH, work.num_images / images_per_s
    saved_s = all_s * (1 - 1 / gain)
    reason = (
        f"estimated: {saved_s:,.0f} s saved of {all_s:,.0f} s, {cost_s:,.0f} s of compiling {work.num_graphs} graphs"
    )
    return Decision(saved_s >= _LEAST_RETURN * cost_s, reason)


@dataclass(frozen=True, slots=True)
class Work:
    """What a run computes from its first step to its last, whatever a checkpoint has of it already."""

    num_images: float  # of one process, those of smaller sides counted by their area
    num_graphs: int  # that are compiled: one for each side and each unfrozen stage, and one for evaluation

    @classmethod
    def of(cls, settings: Settings, steps_per_epoch: int, images_a_step: int) -> Work:
        """`images_a_step`: of one process."""
        model, left = settings.model, steps_per_epoch * settings.train.epochs
        left = min(left, settings.train.stop_at_step or left)
        num_images, graphs = 0.0, set()
        for epoch in range(settings.train.epochs):
            steps, side = min(left, steps_per_epoch), schedule.side_px(epoch, settings)
            if not steps:
                break
            left -= steps
            num_images += steps * images_a_step * (side / settings.data.image_size) ** 2
            for moment in (epoch, epoch + (steps - 1) / steps_per_epoch):
                graphs.add((side, resnet.frozen_at(model.freeze, model.unfreeze_every_epochs, moment)))
        return cls(num_images, len(graphs) + 1)


def what_is_lacking(environment: Mapping[str, str] = os.environ) -> str:
    """What `torch.compile` needs on a GPU and this machine has not; "" where it has all.

    Source: triton/runtime/build.py; torch/_inductor/scheduler.py.
    """
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 0):
        return f"{torch.cuda.get_device_name()} is too old for Triton"
    names = shlex.split(environment.get("CC", ""))[:1] or ["gcc", "clang"]
    if not any(shutil.which(name) for name in names):
        return f"there is no C compiler: {' or '.join(names)} (on Debian and Ubuntu: apt-get install gcc)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if header.exists() else f"{header} is missing (on Debian and Ubuntu: apt-get install python3-dev)"


def refuse_without_compiler(lacking: str) -> None:
    if lacking:
        raise SettingsError(
            f"model.compile is true, and {lacking}",
            "torch would fail in the first step",
            "install it, or set model.compile to auto",
        )


def keep_compiled_code(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where compiled code is kept from one start to the next: torch's default is a folder in /tmp.

    Not in ~/.cache/wasteddp, whose files are deleted to make room for shards.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no home, or one that cannot be written: torch's own folder
        folder = Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wasteddp-compiled"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
