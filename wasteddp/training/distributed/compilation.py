"""Decides whether to compile the network: as set, as when the run started, or if compiling saves more than it costs."""

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
from wasteddp.order.plan import TrainPlan
from wasteddp.settings import Settings
from wasteddp.training import schedule
from wasteddp.training.distributed.runtime import Runtime

# Measured on one H200, torch 2.11, ResNet50 at 224 px (docs/notes.md): images/s with compilation / without, and the
# seconds of the first step. For other cards and networks it is an estimate, so the saving must be a multiple of the
# cost.
_GAIN = {"bf16": 6518 / 4574, "fp16": 6912 / 5871}
_SECONDS_A_GRAPH = 62.0
_LEAST_RETURN = 2.0


@dataclass(frozen=True, slots=True)
class Decision:
    compiles: bool
    reason: str


def choose(settings: Settings, runtime: Runtime, plan: TrainPlan) -> Runtime:
    """Return the runtime with the decision whether to compile the network, before it is built. All ranks.

    Raises:
        SettingsError: on every rank: model.compile is true and this machine has no compiler for it.
    """
    is_gpu = runtime.device.type == "cuda"
    lacking = what_is_lacking() if is_gpu else ""
    if settings.model.compile is True:
        with runtime.sharing_errors():
            refuse_without_compiler(lacking)
    work = Work.of(settings, plan.steps_per_epoch, settings.train.batch_size // runtime.world_size)
    decision = decide(
        settings.model.compile,
        kept=runtime.kept.compiles,
        gain=_GAIN.get(runtime.precision, 1.0) if is_gpu else 1.0,
        work=work,
        images_per_s=runtime.images_per_s,
        is_deterministic=settings.run.deterministic,
        lacking=next(filter(None, runtime.gather(lacking)), ""),  # all ranks
    )
    if decision.compiles and is_gpu:  # not on a CPU, where a kill can leave a partly written library
        keep_compiled_code()
    return replace(runtime, compiles=decision.compiles, compile_reason=decision.reason)


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
    """Decide whether to compile, for True, False or "auto".

    Args:
        kept: the decision in the checkpoint that the run resumes from.
        gain: images/s with compilation / images/s without; 1: unknown.
        images_per_s: of this process at the full image size, without compilation; 0: unknown.
        lacking: what this machine lacks for compilation; "": nothing.
    """
    if asked != "auto":
        return Decision(bool(asked), "as set")
    if lacking:
        return Decision(False, lacking)
    if kept is not None:
        return Decision(kept, "as when the run started")
    if is_deterministic:
        return Decision(False, "run.deterministic is set, and the estimate depends on a measurement")
    if gain <= 1:
        return Decision(False, "no gain is known for this device and precision")
    if not images_per_s:
        return Decision(False, "too little free memory to measure the saving")
    cost_s, all_s = work.num_graphs * _SECONDS_A_GRAPH, work.num_images / images_per_s
    saved_s = all_s * (1 - 1 / gain)
    reason = (
        f"estimate: saves {saved_s:,.0f} s of {all_s:,.0f} s, costs {cost_s:,.0f} s to compile {work.num_graphs} graphs"
    )
    return Decision(saved_s >= _LEAST_RETURN * cost_s, reason)


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a whole run, including the steps before a checkpoint."""

    num_images: float  # of one process; smaller images count by their area
    num_graphs: int  # to compile: one for each image size and set of frozen stages, and one for evaluation

    @classmethod
    def of(cls, settings: Settings, steps_per_epoch: int, images_a_step: int) -> Work:
        """Return the work that follows from the settings. `images_a_step` is that of one process."""
        model, left = settings.model, steps_per_epoch * settings.train.epochs
        left = min(left, settings.train.stop_at_step or left)
        num_images, graphs = 0.0, set()
        epochs, full_px = settings.train.epochs, settings.data.image_size
        for epoch in range(epochs):
            steps = min(left, steps_per_epoch)
            side = schedule.side_px(epoch, settings.schedule, full_px=full_px, epochs=epochs)
            if not steps:
                break
            left -= steps
            num_images += steps * images_a_step * (side / full_px) ** 2
            for moment in (epoch, epoch + (steps - 1) / steps_per_epoch):
                graphs.add((side, schedule.frozen_at(model.freeze, model.unfreeze_every_epochs, moment)))
        return cls(num_images, len(graphs) + 1)


def what_is_lacking(environment: Mapping[str, str] = os.environ) -> str:
    """Return what this machine lacks for `torch.compile` on a GPU; "" if it lacks nothing.

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
            "install what is missing, or set model.compile to auto",
        )


def keep_compiled_code(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep compiled code for later starts, in ~/.cache/wasteddp-compiled: torch's default is a folder in /tmp.

    It is not in ~/.cache/wasteddp, where files are deleted to make room for shards.
    """
    with contextlib.suppress(OSError, RuntimeError):  # without a writable home folder, torch's default is used
        folder = Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wasteddp-compiled"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
