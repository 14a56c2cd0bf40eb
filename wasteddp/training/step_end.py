"""What is due behind a step, in its order: the evaluation, the row of metrics, the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from wasteddp.errors import StoppedError, WastedError
from wasteddp.settings import Settings
from wasteddp.training import messages
from wasteddp.training.checkpoint.files import Progress
from wasteddp.training.checkpoint.manager import Keeper
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.evaluate import evaluate
from wasteddp.training.metrics import Meter
from wasteddp.training.schedule import Due
from wasteddp.training.tracking.tracker import Tracker


@dataclass(frozen=True, slots=True)
class StepEnd:
    """Made and called on all ranks.

    Args:
        network: what is evaluated, prepared by Accelerate.
        meter: begins anew behind what is no training time.
        last_step: of this start of the run.
    """

    settings: Settings
    world: Runtime
    data: Inputs
    network: nn.Module
    keeper: Keeper
    tracker: Tracker
    meter: Meter
    last_step: int

    def __call__(self, progress: Progress, row: dict[str, float], due: Due) -> Progress:
        """All ranks, with the same row: the progress with its evaluation.

        A signal ends an evaluation, which may take longer than there is time: the step is saved with its metrics as
        `unmeasured`, and measured when the run goes on (`pending`). So is a step whose evaluation fails.

        Args:
            row: the step's metrics so far.

        Raises:
            WastedError: on every rank: the evaluation failed.
        """
        world, settings, tracker = self.world, self.settings, self.tracker
        epochs = progress.step / self.data.plan.steps_per_epoch
        epoch, better = (progress.step - 1) // self.data.plan.steps_per_epoch, None
        if due.evaluates:
            try:
                scores, seen = evaluate(self.network, self.data, world, settings.evaluate.batch_size)
            except WastedError as error:
                progress = replace(progress, unmeasured=row)
                self.keeper.save(progress, epoch=epoch, best=None)
                if isinstance(error, StoppedError):
                    return progress
                raise
            progress = replace(progress, unmeasured=None).with_evaluation(scores[f"val/{settings.evaluate.metric}"])
            better = seen if progress.best_step == progress.step else None
            row = row | scores | progress.best_metric
            tracker.show_mistakes(progress.step, self.data, seen)
        tracker.advance(progress.step, f"epoch {epochs:.1f}")
        if row:
            tracker.log(progress.step, row | progress.counts | self.keeper.metrics)
            line = messages.progress_line(progress.step, self.last_step, row, better is not None)
            tracker.say(line, in_passing=not due.evaluates)
        if due.saves:
            tracker.flush()
            self.keeper.save(progress, epoch=epoch, best=better)
            self.meter.restart()  # an evaluation is no training time
            if comment := self.keeper.notice.comment(row):
                tracker.say(comment)
        return progress

    def pending(self, progress: Progress) -> Progress:
        """All ranks, before the first step: measures the step that was saved unmeasured, if it was."""
        if progress.unmeasured is None:
            return progress
        return self(progress, progress.unmeasured, Due(evaluates=True, saves=True, logs=True))
