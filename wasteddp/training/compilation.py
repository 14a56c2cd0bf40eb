"""Whether the network of a run is compiled: as set, as when the run began, or where it saves more than it costs."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from wasteddp.data.plan import TrainPlan
from wasteddp.errors import SettingsError
from wasteddp.model import resnet
from wasteddp.settings import Settings
from wasteddp.training import sizes
from wasteddp.training.runtime import Runtime

# Source: one H200, torch 2.11, ResNet50 at 224 px (configs/NOTES.md): images/s compiled over those without, and the
# seconds that the first step took. An estimate for other cards and networks, so it must save some times its cost.
_GAIN = {"bf16": 6518 / 4574, "fp16": 6912 / 5871}
_SECONDS_A_GRAPH = 62.0
_LEAST_RETURN = 2.0


@dataclass(frozen=True, slots=True)
class Decision:
    compiles: bool
    reason: str


def settled(settings: Settings, world: Runtime, plan: TrainPlan) -> Runtime:
    """All ranks: what is known before the network is made, with whether it is compiled.

    Raises:
        SettingsError: model.compile is true and this machine has no compiler for it; on every rank.
    """
    is_gpu = world.device.type == "cuda"
    lacking = what_is_lacking() if is_gpu else ""
    if settings.model.compile is True:
        with world.together():
            refuse_without_compiler(lacking)
    steps = plan.steps_per_epoch * settings.train.epochs
    steps = min(steps, settings.train.stop_at_step or steps)
    decision = decide(
        settings.model.compile,
        kept=world.kept.compiles,
        gain=_GAIN.get(world.precision, 1.0) if is_gpu else 1.0,
        num_images=steps * settings.train.batch_size // world.world_size,
        images_per_s=world.images_per_s,
        num_graphs=num_graphs(settings),
        lacking=next(filter(None, world.gather(lacking)), ""),  # all ranks
    )
    if decision.compiles:
        keep_compiled_code()
    return replace(world, compiles=decision.compiles, compile_reason=decision.reason)


def decide(
    asked: bool | str,
    *,
    kept: bool | None,
    gain: float,
    num_images: int,
    images_per_s: float,
    num_graphs: int,
    lacking: str,
) -> Decision:
    """Whether to compile for True, False or "auto".

    Args:
        kept: what the checkpoint says that the run goes on from.
        gain: images/s compiled over those without; 1: none is known.
        num_images: that this process trains on in the whole run.
        images_per_s: of this process, not compiled; 0: unknown.
        num_graphs: that are compiled.
        lacking: what this machine has not that compiling needs; "": nothing.
    """
    if asked != "auto":
        return Decision(bool(asked), "as set")
    if lacking:
        return Decision(False, lacking)
    if kept is not None:
        return Decision(kept, "as when the run began")
    if gain <= 1:
        return Decision(False, "no gain is known for this device and precision")
    if not images_per_s:
        return Decision(False, "there was too little free memory to measure what it would save")
    cost_s = num_graphs * _SECONDS_A_GRAPH
    saved_s = num_images / images_per_s * (1 - 1 / gain)
    reason = (
        f"estimated: {saved_s:,.0f} s saved of {num_images / images_per_s:,.0f} s, {cost_s:,.0f} s of compiling "
        f"{num_graphs} graphs"
    )
    return Decision(saved_s >= _LEAST_RETURN * cost_s, reason)


def num_graphs(settings: Settings) -> int:
    """One for each size of training images and each stage that is unfrozen, and one for evaluation."""
    epochs, model = settings.train.epochs, settings.model
    starts = {epoch for epoch, _ in sizes.changes(settings)}
    every = model.unfreeze_every_epochs
    kinds = {
        (sizes.side_px(int(epoch), settings), resnet.frozen_at(model.freeze, every, epoch))
        for epoch in {*starts, *((number * every for number in range(1, len(resnet.STAGES) + 1)) if every else ())}
        if epoch < epochs
    }
    return len(kinds) + 1


def what_is_lacking() -> str:
    """What `torch.compile` needs on a GPU and this machine has not; "" where it has all."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name):
        return "there is no C compiler (cc, gcc, clang or $CC)"
    return ""


def refuse_without_compiler(lacking: str) -> None:
    if lacking:
        raise SettingsError(
            f"model.compile is true, and {lacking}",
            "torch would fail in the first step",
            "install it (on Debian and Ubuntu: apt-get install gcc; pip install triton), or set model.compile to auto",
        )


def keep_compiled_code() -> None:
    """Where compiled code is kept from one start to the next: torch's default is a folder in /tmp."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wasteddp" / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
