"""What is due after a step, by the settings alone."""

from __future__ import annotations

from dataclasses import dataclass

from wasteddp.data.plan import TrainPlan
from wasteddp.settings import Settings


@dataclass(frozen=True, slots=True)
class Due:
    """After one step. What is saved is measured first, or a diverged model could push out the last good checkpoint."""

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
        """After step number `step`; `is_asked`: a checkpoint is due for another reason."""
        evaluates = step % self.evaluate_every == 0 or step == self.last_step
        saves = evaluates or is_asked or (self.checkpoint_every > 0 and step % self.checkpoint_every == 0)
        return Due(evaluates, saves, saves or step % self.log_every == 0)
