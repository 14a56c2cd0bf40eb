"""What is due behind a step, by the settings alone; and what the ranks tell each other before it."""

from __future__ import annotations

from dataclasses import dataclass

from wasteddp.data.batch import Batch
from wasteddp.data.plan import TrainPlan
from wasteddp.settings import Settings
from wasteddp.training import coverage, signals
from wasteddp.training.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Due:
    """Behind one step. What is saved is measured first, or a diverged model could push out the last good checkpoint."""

    evaluates: bool
    saves: bool
    logs: bool


@dataclass(frozen=True, slots=True)
class Agenda:
    """Steps between two of each; 0: never."""

    evaluate_every: int
    checkpoint_every: int
    log_every: int
    last_step: int

    @classmethod
    def of(cls, settings: Settings, plan: TrainPlan, last_step: int) -> Agenda:
        return cls(
            settings.evaluate.every_steps or plan.steps_per_epoch,
            settings.checkpoint.every_steps,
            settings.train.log_every_steps,
            last_step,
        )

    def due(self, step: int, *, is_asked: bool) -> Due:
        """Behind step number `step`; `is_asked`: a checkpoint is due for another reason."""
        evaluates = step % self.evaluate_every == 0 or step == self.last_step
        saves = evaluates or is_asked or (self.checkpoint_every > 0 and step % self.checkpoint_every == 0)
        return Due(evaluates, saves, saves or step % self.log_every == 0)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks know before a step, the same on each: the sums of what each knew."""

    stops: bool
    saves: bool
    damaged: int
    sums: list[int]  # for coverage


def agree(batch: Batch, world: Runtime, *, seed: int, asks: bool) -> Agreement:
    """All ranks: whether one of them was told to stop, cannot go on or asks for a save; what their batches hold."""
    ends = bool(signals.STOP) or batch.failure is not None
    counts = ends, asks, len(batch.damage), *coverage.of(batch, seed)
    stops, saves, damaged, *sums = world.totals(*counts)  # all ranks
    return Agreement(stops > 0, saves > 0, damaged, [*sums, damaged])
