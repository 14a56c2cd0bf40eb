"""What a run does before, between and after its optimizer steps, in a fixed order. The steps themselves are in
`train.py`.

    begin        restore the checkpoint, if there is one, and create the parts of the session
    open         report the run; evaluate a step whose evaluation was interrupted
    batches      before each step, agree with the other ranks whether to stop or save
    stop         save before this batch
    before_step  count damaged samples; decide what is due after the step
    micro_batches, backward, step    of the loop, with the metrics and the check for divergence
    after_step   prove the coverage of the epoch, read the metrics, check for divergence, evaluate, report, save
    ends         stop early, or after an interrupted evaluation
    finish       wait for the disk, complete the model, print the closing message, return the exit code

All functions run on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from wasteddp.data.batch import Batch
from wasteddp.errors import EXIT_FINISHED, EXIT_RESUMABLE, StoppedError, WastedError
from wasteddp.settings import Settings
from wasteddp.training import coverage_proof, messages, micro_batch, run_folder
from wasteddp.training.agreement import Agreement, agreed
from wasteddp.training.build_model import Built
from wasteddp.training.checkpoint.best_model import describe_calibration, describe_model_card
from wasteddp.training.checkpoint.manager import CheckpointManager
from wasteddp.training.checkpoint.progress import Lineage, Progress, measure_of
from wasteddp.training.coverage_proof import StepHashes
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.divergence import Guard, Rollback, Update
from wasteddp.training.evaluate import evaluate
from wasteddp.training.features import keep_features
from wasteddp.training.meter import Meter
from wasteddp.training.optimizers import ScheduledOptimizer
from wasteddp.training.schedule import Due, Intervals, has_new_size
from wasteddp.training.tracking.profiler import Profiler
from wasteddp.training.tracking.tracker import Tracker, TrackerScope
from wasteddp.training.watchdog import exits


class Start(NamedTuple):
    """How a run starts."""

    resume: str  # --resume
    accepted: Sequence[str]  # the names in --accept-changes


def begin(
    settings: Settings,
    built: Built,
    data: Inputs,
    start: Start,
    rollback: Rollback,
    *,
    max_steps: int | None = None,
) -> tuple[Session, Progress]:
    """Start or resume the run: from the requested checkpoint, else the newest intact one, else step 0.

    Args:
        rollback: the number of rollbacks in this process and the learning-rate factor that they led to.
        max_steps: number of steps of this start; None: as set.
    """
    optimizer = built.optimizer.unwrapped
    manager = CheckpointManager(settings, built.runtime, data, built.model, optimizer, further=built.average.states)
    teacher, origin = built.objective.teacher.sha256, built.origin
    progress = Progress(Lineage.of(settings, data.manifest, teacher=teacher))
    measure = measure_of(settings.data, settings.evaluate, data.manifest.sha256)
    progress, changes = replace(progress, best_in=measure), []
    if checkpoint := manager.starting_point(start.resume, start.accepted, lineage=progress.lineage):
        before, progress = checkpoint.progress, checkpoint.progress.started_again(progress.lineage, measure)
        changes = [*manager.changes, *messages.best_starts_again(before, progress)]
        origin = f"{checkpoint.path}, attempt {progress.attempt}"
    all_steps = data.plan.steps_per_epoch * settings.train.epochs
    last_step = progress.step + max_steps if max_steps else min(all_steps, settings.train.stop_at_step or all_steps)
    patience = 0 if max_steps else settings.train.early_stop_epochs
    trains = progress.step < last_step and not progress.stopped_early(patience)
    if checkpoint:
        if not trains:
            manager.refuse_changes_of_a_finished_run(changes, step=progress.step)
        manager.state.restore(checkpoint)
    progress = rollback.applied(progress)
    runtime, progress = micro_batch.choose_size(settings, built.runtime, built.objective, built.model, progress)
    is_recorded = trains or progress.unmeasured is not None or not run_folder.is_closed(Path(settings.run.out))
    tracker = run_folder.begin_run(
        settings, runtime, data, progress, checkpoint, last_step=last_step, is_recorded=is_recorded
    )
    progress = replace(progress, tracker_id=tracker.id)
    num_classes = len(data.manifest.classes)
    session = Session(
        settings=settings,
        runtime=runtime,
        data=data,
        built=built,
        manager=manager,
        tracker=tracker,
        origin=origin,
        last_step=last_step,
        patience=patience,
        changes=changes,
        is_recorded=is_recorded,
        guard=Guard(settings, runtime, built.model, optimizer, num_classes=num_classes, progress=progress),
        meter=Meter(runtime.device),
        profiler=Profiler(settings.profile, runtime, Path(settings.run.out) / "profile", tracker.say),
        hashes=StepHashes(settings.run, runtime, progress.step),
        is_check=max_steps is not None,
    )
    return session, progress


@dataclass(slots=True)
class Session:
    """Created by `begin`, used as `with session:`. The exit closes the tracker first, then the checkpoint manager."""

    settings: Settings
    runtime: Runtime  # with the chosen micro-batch
    data: Inputs
    built: Built
    manager: CheckpointManager
    tracker: Tracker
    origin: str  # a description of the weights, for the log
    last_step: int  # of this start
    patience: int  # evaluations without a better one, after which the run ends; 0: never
    changes: list[str]  # from the checkpoint to this start, a line each
    is_recorded: bool  # False: the run was finished and closed, and this start leaves its files as they are
    guard: Guard
    meter: Meter
    profiler: Profiler
    hashes: StepHashes
    is_check: bool = False  # its files are removed at the end
    stopped_by: Batch | None = None  # the batch at which the ranks agreed to stop
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Session:
        self._stack.enter_context(self.manager)
        self._stack.enter_context(TrackerScope(self.tracker))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    @property
    def writes_report(self) -> bool:
        """Whether this rank writes the report at the end."""
        return self.runtime.is_main and self.is_recorded

    def open(self, progress: Progress) -> Progress:
        """Report the run, and evaluate the step of the checkpoint if it was saved without its evaluation."""
        self.runtime.watch.detail = self.data.at_work
        for line in self.changes:
            self.tracker.say(line)
        words = self.origin + self.built.objective.teacher.words
        self.tracker.say(messages.facts(self.settings, self.runtime, self.data, self.last_step, words))
        if progress.step == 0:
            self.tracker.show_augmented(self.data, self.built.objective.augment)
        if progress.unmeasured is not None:
            progress = self._measure(progress, progress.unmeasured, Due(evaluates=True, saves=True, logs=True))
        if progress.unmeasured is not None or self._stops_early(progress):
            self.last_step = progress.step
        return progress

    def batches(self, progress: Progress) -> Iterator[tuple[Batch, Agreement]]:
        """Yield this rank's batches up to the last step, each with the agreement of all ranks before its step."""
        planned = self.data.batches(progress.step, self.last_step, self.runtime)
        ahead = agreed(planned, self.runtime, seed=self.data.plan.seed, asks=self.manager.asks)
        watched = self.runtime.watch.steps(self.profiler.watched(ahead), progress.step)
        for batch, agree in self.meter.waiting(watched):
            yield batch, agree()

    def stop(self, progress: Progress, batch: Batch) -> Progress:
        """Save the run before this batch."""
        if self.meter.num_steps:
            row = self.meter.read(self.runtime, self.settings.train.batch_size)
            progress = self.guard.check(progress, row, saves=True)
        self.manager.save(progress, epoch=batch.epoch, best=None)
        self.stopped_by = batch
        return progress

    def before_step(self, progress: Progress, batch: Batch, agreement: Agreement) -> tuple[Progress, Due]:
        """Return the progress including the batch's damaged samples, and what is due after the step."""
        if agreement.damaged:
            progress = replace(progress, damaged=progress.damaged + agreement.damaged)
            limit = self.settings.data.max_damaged
            messages.report_damage(self.runtime, self.tracker.say, batch.damage, progress.damaged, limit)
        self.guard.begin_step()
        settings, steps_per_epoch = self.settings, self.data.plan.steps_per_epoch
        full_px, epochs = settings.data.image_size, settings.train.epochs
        is_new_size = has_new_size(batch.epoch, settings.schedule, full_px=full_px, epochs=epochs)
        if batch.step_in_epoch == 0 and is_new_size:
            self.runtime.watch.at("computing at a new image size", slow=True)  # the network may be compiled for it
        is_asked = agreement.saves or self.manager.notice.wants_a_save()
        every = settings.evaluate.every_steps or steps_per_epoch
        intervals = Intervals(every, settings.checkpoint.every_steps, settings.train.log_every_steps, self.last_step)
        return progress, intervals.due(progress.step + 1, is_asked=is_asked)

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """Yield the micro-batches of this rank's batch; the backward pass of the last one averages the gradients."""
        return self.runtime.micro_batches(batch, self.built.ddp)

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass of a micro-batch, and add its part of the step's mean loss to the metrics."""
        self.runtime.accelerator.backward(loss)
        self.meter.add(loss)

    def step(self, optimizer: ScheduledOptimizer, due: Due) -> Update:
        """Clip the averaged gradient and update the weights; a step that diverged may be skipped."""
        return self.guard.step(optimizer, self.meter.step_loss, needs_norm=due.logs)

    def after_step(
        self,
        progress: Progress,
        batch: Batch,
        agreement: Agreement,
        due: Due,
        lr: float,
        update: Update,
    ) -> Progress:
        """Count the step, and do what is due after it."""
        runtime, plan = self.runtime, self.data.plan
        self.built.average.update(progress.step, update.skipped)
        covered = coverage_proof.add(progress.covered, agreement.sums, batch)
        changed = progress.changed if batch.step_in_epoch else []
        progress = replace(progress, step=progress.step + 1, covered=covered, changed=changed)
        self.meter.step_done(update.skipped)
        self.profiler.step_done()
        self.hashes.add(progress.step, batch, self.built.model)
        row: dict[str, float] = {}
        if batch.step_in_epoch + 1 == plan.steps_per_epoch:
            row |= coverage_proof.prove(progress, plan, batch.epoch, runtime, self.tracker)
        if due.logs:
            row |= self.meter.read(runtime, self.settings.train.batch_size)
            row |= {"epoch": progress.step / plan.steps_per_epoch, "lr": lr, "train/grad_norm": float(update.norm or 0)}
            progress = self.guard.check(progress, row, saves=due.saves)
        if due.evaluates:
            # first: a checkpoint saved without its evaluation must already hold the averaged statistics
            self.manager.state.reconcile()
        return self._measure(progress, row, due)

    def ends(self, progress: Progress, due: Due) -> bool:
        """Whether the run ends before its last step."""
        if progress.unmeasured is None and due.evaluates and self._stops_early(progress):
            self.tracker.say(messages.early_stop(self.settings.evaluate.metric, progress))
            return True
        return progress.unmeasured is not None

    def finish(self, progress: Progress) -> int:
        """Wait until everything is on disk, report how the run ended, and return the exit code."""
        self.manager.close()
        exit_code = EXIT_FINISHED
        if self.stopped_by or progress.unmeasured is not None:
            exit_code = self.tracker.exit_code = EXIT_RESUMABLE
            # the error of a rank that could not read its batch, now that the run is saved
            self.runtime.raise_together(self.stopped_by.failure if self.stopped_by else None)
            if self.runtime.is_main:
                run_folder.mark_resumable(Path(self.settings.run.out))
        elif self.runtime.is_main and self.is_recorded and not self.is_check:
            run = Path(self.settings.run.out)
            if line := describe_calibration(run):
                self.tracker.say(line)
            keep_features(run, self.runtime, self.data, self.tracker.say)
            if line:  # there is a model
                self.tracker.say(describe_model_card(run, self.data.manifest))
        message = messages.closing(
            self.settings.run.out,
            progress,
            exit_code,
            exits.STOP.signal_name,
            metric=self.settings.evaluate.metric,
            eval_split=self.settings.data.eval_split,
            splits=self.data.manifest.splits,
        )
        self.tracker.say(message)
        return exit_code

    def _stops_early(self, progress: Progress) -> bool:
        return progress.stopped_early(self.patience)

    def _measure(self, progress: Progress, row: dict[str, float], due: Due) -> Progress:
        """Do what is due after a step: first the evaluation, then the row of metrics, then the checkpoint.

        A signal interrupts an evaluation, because there may be too little time to finish it: the step is saved with its
        metrics as `unmeasured`, and evaluated when the run resumes. The same holds for an evaluation that fails.

        Args:
            row: the step's metrics so far, the same on all ranks.

        Raises:
            WastedError: on every rank: the evaluation failed.
        """
        runtime, settings, tracker = self.runtime, self.settings, self.tracker
        epoch, better = (progress.step - 1) // self.data.plan.steps_per_epoch, None
        if due.evaluates:
            try:
                scores, seen = evaluate(
                    self.built.average.network, self.data, runtime, settings.evaluate.batch_size, settings.model
                )
            except WastedError as error:
                progress = replace(progress, unmeasured=row)
                self.manager.save(progress, epoch=epoch, best=None)
                if isinstance(error, StoppedError):
                    return progress
                raise
            progress = replace(progress, unmeasured=None).with_evaluation(scores[f"val/{settings.evaluate.metric}"])
            better = seen if progress.best_step == progress.step else None
            row = row | scores | progress.best_metric
            tracker.show_mistakes(progress.step, self.data, seen)
        tracker.advance(progress.step, f"epoch {progress.step / self.data.plan.steps_per_epoch:.1f}")
        if row:
            tracker.log(progress.step, row | progress.counts | self.manager.metrics)
            line = messages.progress_line(progress.step, self.last_step, row, better is not None)
            tracker.say(line, in_passing=not due.evaluates)
        if due.saves:
            tracker.flush()
            self.manager.save(progress, epoch=epoch, best=better)
            self.meter.restart()  # an evaluation is not training time
            if comment := self.manager.notice.comment(row):
                tracker.say(comment)
        return progress
