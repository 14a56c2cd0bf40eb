"""Image sizes and intervals as functions of the step. Learning rates are in `optimization.optimizers`.

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

from wasteddp.order.plan import TrainPlan
from wasteddp.settings import Settings

STEP_PX = 16


def side_px(epoch: int, settings: Settings) -> int:
    """Return the side of the training images of an epoch; it never shrinks from one epoch to the next.

    The side is schedule.start_size in the first epoch, and data.image_size after the fraction schedule.full_size_at of
    the epochs. Without a start_size it is always data.image_size.
    """
    start, full = settings.schedule.start_size, settings.data.image_size
    growing = settings.schedule.full_size_at * settings.train.epochs  # epochs
    if not start or epoch >= growing:
        return full
    return start + int((full - start) * epoch / growing) // STEP_PX * STEP_PX


def changes(settings: Settings) -> list[tuple[int, int]]:
    """Return (epoch, side in px) of the first epoch and of each epoch in which the side changes."""
    sides = [(epoch, side_px(epoch, settings)) for epoch in range(settings.train.epochs)]
    return [now for before, now in zip([(0, 0), *sides], sides, strict=False) if before[1] != now[1]]


def describe(settings: Settings) -> str:
    """Describe the sides of a run: "64 px, 80 px from epoch 4, ...", with epochs counted from 0 as in the metrics."""
    first, *later = changes(settings)
    return ", ".join([f"{first[1]} px", *(f"{side} px from epoch {epoch}" for epoch, side in later)])


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

    @classmethod
    def of(cls, settings: Settings, plan: TrainPlan, last_step: int) -> Intervals:
        return cls(
            settings.evaluate.every_steps or plan.steps_per_epoch,
            settings.checkpoint.every_steps,
            settings.train.log_every_steps,
            last_step,
        )

    def due(self, step: int, *, is_asked: bool) -> Due:
        """Return what is due after step number `step`. `is_asked`: a checkpoint is due for another reason."""
        evaluates = step % self.evaluate_every == 0 or step == self.last_step
        saves = evaluates or is_asked or (self.checkpoint_every > 0 and step % self.checkpoint_every == 0)
        return Due(evaluates, saves, saves or step % self.log_every == 0)
