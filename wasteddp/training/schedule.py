"""What changes with the step, as pure functions of it: the learning rate, the size of the images, the frozen stages,
and what is due.

The learning rate rises linearly in the warm-up, and then follows `schedule.name`.

Progressive sizes. Training starts with small images, on which the network learns coarse features in a fraction of the
time (the cost of a step grows with the square of the side), and learns fine detail at the full size later. The samples
and their crops, which are fractions of the image, do not depend on the size. Evaluation always uses its own size.

The side grows linearly with the epochs, in steps of 16 px to keep the number of sizes small: a network compiled with
static shapes is compiled again in the first step of each size.

Source: Tan and Le 2021, "EfficientNetV2: Smaller Models and Faster Training", section 4 and algorithm 1. There the
augmentation gets stronger as the images grow, which is left to the settings here. Earlier: Howard 2018 (fast.ai,
DAWNBench).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, expm1, floor, log, log1p, pi
from typing import assert_never

from wasteddp.model.stages import STAGES
from wasteddp.settings import Model, Schedule

STEP_PX = 16
_WARMUP_START = 0.01  # of the peak learning rate, because BatchNorm has no statistics yet


def learning_rate(step: int, peak: float, schedule: Schedule, *, epochs: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0. Cosine: Loshchilov and Hutter 2017.

    To add a schedule, also add its name to `settings.Schedule` (then write configs/settings.schema.json again) and to
    docs/recipes.md.

    Args:
        peak: optimizer.lr.
        epochs: of the whole run.
    """
    total, warmup = steps_per_epoch * epochs, round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (_WARMUP_START + (1 - _WARMUP_START) * step / warmup)
    if schedule.name == "constant":
        return peak
    if schedule.name == "step":
        return peak * schedule.step_factor ** (step // (schedule.step_epochs * steps_per_epoch))
    if schedule.name == "cosine_restarts":
        done = _part_of_cycle(step - warmup, schedule, steps_per_epoch)
    elif schedule.name == "cosine":
        done = (step - warmup) / max(1, total - warmup)
    else:
        assert_never(schedule.name)  # mypy reports a name that has no branch
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * (1 + cos(pi * done)) / 2)


def _part_of_cycle(step: int, schedule: Schedule, steps_per_epoch: int) -> float:
    """Return the fraction of the current cycle that is done, in [0, 1). `step` counts from the end of the warm-up.

    With a first cycle of c steps and a factor f, cycle i starts at c (f^i - 1) / (f - 1) and takes c f^i steps. So i is
    the logarithm of 1 + step (f - 1) / c to the base f, rounded down. Source: Loshchilov and Hutter 2017, section 3.
    """
    first, growth = schedule.cycle_epochs * steps_per_epoch, schedule.cycle_factor - 1
    if growth == 0:
        return step % first / first
    # log1p and expm1 keep the digits of a factor such as 1.000001; 1e-9 is less than a step of any run
    number = floor(log1p(step * growth / first) / log(schedule.cycle_factor) + 1e-9)
    begin = first * expm1(number * log(schedule.cycle_factor)) / growth
    return max(0.0, step - begin) / (first * schedule.cycle_factor**number)


def side_px(epoch: int, schedule: Schedule, *, full_px: int, epochs: int) -> int:
    """Return the side of the training images of an epoch; it never shrinks from one epoch to the next.

    The side is schedule.start_size in the first epoch, and data.image_size after the fraction schedule.full_size_at of
    the epochs. Without a start_size it is always data.image_size.

    Args:
        full_px: data.image_size.
        epochs: of the whole run.
    """
    start, growing = schedule.start_size, schedule.full_size_at * epochs
    if not start or epoch >= growing:
        return full_px
    return start + int((full_px - start) * epoch / growing) // STEP_PX * STEP_PX


def has_new_size(epoch: int, schedule: Schedule, *, full_px: int, epochs: int) -> bool:
    """Whether the side differs from that of the epoch before."""
    before, now = (side_px(e, schedule, full_px=full_px, epochs=epochs) for e in (max(0, epoch - 1), epoch))
    return before != now


def size_changes(schedule: Schedule, *, full_px: int, epochs: int) -> list[tuple[int, int]]:
    """Return (epoch, side in px) of the first epoch and of each epoch in which the side changes."""
    sides = [(epoch, side_px(epoch, schedule, full_px=full_px, epochs=epochs)) for epoch in range(epochs)]
    return [now for before, now in zip([(0, 0), *sides], sides, strict=False) if before[1] != now[1]]


def describe_sizes(schedule: Schedule, *, full_px: int, epochs: int) -> str:
    """Describe the sides of a run: "64 px, 80 px from epoch 4, ...", with epochs counted from 0 as in the metrics."""
    first, *later = size_changes(schedule, full_px=full_px, epochs=epochs)
    return ", ".join([f"{first[1]} px", *(f"{side} px from epoch {epoch}" for epoch, side in later)])


def frozen_at(freeze: str, unfreeze_every_epochs: float, epoch: float) -> str:
    """Return the last frozen stage after `epoch` epochs, which may be a fraction; "none" if no stage is frozen.

    Gradual unfreezing: every `unfreeze_every_epochs` epochs (0: never) the last frozen stage becomes trainable.
    Source: Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section 3.3.
    """
    if freeze == "none" or not unfreeze_every_epochs:
        return freeze
    names = ["none", *STAGES]
    num_unfrozen = floor(epoch / unfreeze_every_epochs + 1e-9)  # 0.3 / 0.1 is below 3 in floating point
    return names[max(0, names.index(freeze) - num_unfrozen)]


def frozen_to_the_end(model: Model, epochs: int) -> str:
    """Return the last stage that is still frozen in the last step of `epochs` epochs, and so is never trained."""
    return frozen_at(model.freeze, model.unfreeze_every_epochs, epochs - 1e-6)  # an epoch has < 1e6 steps


@dataclass(frozen=True, slots=True)
class Due:
    """What is due after a step. A save also logs, so that a diverged model cannot replace the last good checkpoint."""

    evaluates: bool
    saves: bool
    logs: bool


@dataclass(frozen=True, slots=True)
class Intervals:
    """Number of steps between two evaluations, checkpoints and rows of metrics; 0: never."""

    evaluate_every: int
    checkpoint_every: int
    log_every: int
    last_step: int

    def due(self, step: int, *, is_asked: bool) -> Due:
        """Return what is due after step number `step`. `is_asked`: a checkpoint is due for another reason."""
        evaluates = step % self.evaluate_every == 0 or step == self.last_step
        saves = evaluates or is_asked or (self.checkpoint_every > 0 and step % self.checkpoint_every == 0)
        return Due(evaluates, saves, saves or step % self.log_every == 0)
