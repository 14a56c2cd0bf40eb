"""Saves and restores a run: checkpoints to resume from, and the bundle of the best model with its evaluation."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from wasteddp import environment
from wasteddp.errors import CheckpointError, StorageError
from wasteddp.files import LOCK_WAIT_S, RunLock
from wasteddp.inference.metrics import Seen
from wasteddp.model import ema
from wasteddp.settings import Settings
from wasteddp.training import messages
from wasteddp.training.checkpoint import reader
from wasteddp.training.checkpoint.best_model import card_of, save_best
from wasteddp.training.checkpoint.progress import Lineage, Progress, accepted_changes, changed_settings, refuse_finished
from wasteddp.training.checkpoint.reader import Checkpoint, States
from wasteddp.training.checkpoint.state import RunState, Stateful, room_for_checkpoint, room_for_run
from wasteddp.training.checkpoint.writer import CheckpointWriter, recover, refuse_full_disk
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.watchdog.exits import append_to_log
from wasteddp.training.watchdog.slurm import Notice

SAVE_REQUEST = "SAVE_NOW"  # `touch RUN/SAVE_NOW`; removed once a checkpoint is on disk

SaveBest = Callable[[Mapping[str, torch.Tensor]], None]
OfStates = Callable[[States], None]


class CheckpointManager:
    """Passes the state of a run to the writer, and restores it. Created and called on all ranks; rank 0 writes.

    Until `__exit__`, or until `starting_point` raises, it holds a lock: no other training can write into the run's
    folder.

    Args:
        model, optimizer, further: see `RunState`. If `further` has `ema.STATE`, the evaluation uses that network, and
            the best model is saved from it.
        clock: seconds, for checkpoint.every_minutes; only the clock of rank 0 is used.
    """

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        data: Inputs,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        further: Mapping[str, Stateful] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._runtime, self._data = settings, runtime, data
        self.state = RunState(runtime, model, optimizer, further or {})
        self._clock = clock
        self._evaluated = ema.STATE if further and ema.STATE in further else "model"
        self._commit = environment.commit()
        self._settings_yaml = settings.to_yaml()  # once: it takes 5 to 8 ms
        self._writer: CheckpointWriter | None = None
        self._claim: RunLock | None = None
        self._saved_at = clock()
        self._unsaved_best: Callable[[], None] | None = None  # writes a best model that could not be written yet
        self._failed = False  # whether the last save failed
        self.num_failed, self._stall_ms = 0, 0.0
        self.changes: list[str] = []  # from the checkpoint that the run continues from to this start, a line each
        self.notice = Notice.of(os.environ)
        with runtime.sharing_errors():
            if runtime.is_main:
                there = sum(path.stat().st_size for path in self._checkpoints.glob("step-*/*"))
                model_bytes = self.state.model_bytes
                size = room_for_checkpoint(
                    model_bytes, optimizer=settings.optimizer.name, ema_decay=settings.train.ema_decay
                )
                room = room_for_run(model_bytes, size, keep_last=settings.checkpoint.keep_last)
                refuse_full_disk(self._folder, room - there)
                self._claim = RunLock(self._checkpoints, runtime.say, wait_s=LOCK_WAIT_S)
                recover(self._checkpoints)
                self._writer = CheckpointWriter(
                    self._checkpoints,
                    keep_last=settings.checkpoint.keep_last,
                    keep_every=settings.checkpoint.keep_every,
                    say=self._say,
                )

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer:  # after an error the pending checkpoint is still written; that error is the one to report
            with suppress(StorageError):
                self._writer.close()
        self._release()

    def starting_point(self, resume: str, accepted: Collection[str], *, lineage: Lineage) -> Checkpoint | None:
        """Return the checkpoint to resume from, which rank 0 chooses; None to start at step 0. All ranks.

        Args:
            resume: "auto", "never" or the path of a checkpoint.
            accepted: names of the lineage's fields that may differ from the checkpoint.
            lineage: the lineage of this run.

        Raises:
            CheckpointError: on every rank: the checkpoint cannot be read, or belongs to another run.
        """
        try:
            found: Checkpoint | None = None
            with self._runtime.sharing_errors():
                if self._runtime.is_main:
                    found = reader.starting_point(self._checkpoints, resume, self._runtime.say)
            path = self._runtime.gather(found and found.path)[0]  # all ranks
            with self._runtime.sharing_errors():
                if path and not found:
                    found = reader.read(path)
            if found:  # on all ranks
                remedy = "give every machine the same checkpoint, or one file system for run.out"
                self._runtime.require_equal({f"{found.path}": found.sha256[:12]}, remedy)  # all ranks
            with self._runtime.sharing_errors():
                if found:
                    changes = accepted_changes(found.progress.lineage, lineage, accepted, where=found.path)
                    self.changes = changes + changed_settings(found.settings_yaml, self._settings)
            return found
        except BaseException:
            self._release()
            raise

    def refuse_changes_of_a_finished_run(self, changes: Sequence[str], *, step: int) -> None:
        """All ranks: see `progress.refuse_finished`."""
        try:
            refuse_finished(changes, run=self._settings.run.out, step=step)
        except CheckpointError:
            self._release()
            raise

    @property
    def metrics(self) -> dict[str, float]:
        """The "checkpoint/..." metrics, on rank 0; `checkpoint/seconds` after the first save has finished."""
        seconds = self._writer.seconds if self._writer else None
        row = {"checkpoint/stall_ms": self._stall_ms, "checkpoint/failed": self.num_failed}
        return row if seconds is None else {**row, "checkpoint/seconds": seconds}

    def asks(self) -> bool:
        """Whether checkpoint.every_minutes have passed, or the file SAVE_NOW exists. Rank 0 decides: it is False on the
        other ranks. It is also False while a checkpoint is being written, because a save would wait for it."""
        if not self._writer or self._writer.is_busy:
            return False
        every_s = 60 * self._settings.checkpoint.every_minutes
        return (every_s > 0 and self._clock() - self._saved_at >= every_s) or (self._folder / SAVE_REQUEST).exists()

    def save(self, progress: Progress, *, epoch: int, best: Seen | None) -> None:
        """Start to save the current state. All ranks.

        A save does not change the state of the ranks, so the result does not depend on when a run is saved. If the
        previous save failed, for lack of space or permission, that is reported and counted; complete checkpoints are
        not affected.

        Args:
            best: the evaluation of this state if it is the best so far; the state then becomes the run's model.
        """
        began = time.perf_counter()
        states = self.state.tensors()  # all ranks
        with self._runtime.sharing_errors():
            if self._writer:
                self._wait_and_report()
                scaler, request = self._runtime.accelerator.scaler, self._folder / SAVE_REQUEST
                keep_best: OfStates = self._save_unsaved_best
                if best:
                    settings, data = self._settings, self._data
                    card = card_of(settings, data.manifest, progress, epoch=epoch, commit=self._commit)
                    save = partial(
                        save_best,
                        card=card,
                        seen=best,
                        out=self._folder,
                        shards=settings.data.shards,
                        runtime=self._runtime,
                        data=data,
                    )
                    keep_best = partial(self._save_best, save)
                self._writer.save(
                    replace(
                        progress,
                        scaler=scaler.state_dict() if scaler else None,
                        precision=self._runtime.precision,
                        compiles=self._runtime.compiles,
                    ),
                    states,
                    self._settings_yaml,
                    before=keep_best,
                    after=(lambda: request.unlink(missing_ok=True)) if request.exists() else None,
                )
                self._saved_at = self._clock()
        if self.notice.is_measuring:
            with self._runtime.sharing_errors():
                if self._writer:
                    self._writer.wait()
            self.notice.save_s = time.perf_counter() - began
        self._stall_ms = 1000 * (time.perf_counter() - began)

    def wait(self) -> None:
        """Wait until the pending checkpoint is on disk. All ranks.

        Raises:
            StorageError: on every rank: the save failed, and failed again when it was retried.
        """
        with self._runtime.sharing_errors():
            self._retry_failed_save()

    def close(self) -> None:
        """Wait until everything is on disk, and stop the writer. All ranks.

        Raises:
            StorageError: on every rank: the last save failed, and failed again when it was retried.
        """
        with self._runtime.sharing_errors():
            self._retry_failed_save()
            if self._writer:
                self._writer.close()

    def _wait_and_report(self) -> None:
        """Wait for the previous save, and report it if it failed. Rank 0."""
        self._failed = False
        try:
            if self._writer:
                self._writer.wait()
        except StorageError as error:
            self._failed = True
            self.num_failed += 1
            self._say(messages.not_saved(error))

    def _say(self, message: str) -> None:
        self._runtime.say(message)
        append_to_log(self._folder, message)

    def _retry_failed_save(self) -> None:
        self._wait_and_report()
        if self._writer and self._failed:
            self._writer.again()
            self._writer.wait()
            self._failed = False

    def _save_best(self, save: SaveBest, states: States) -> None:
        """Write the best model, in the writer's thread. If that fails, a copy waits in memory for the next save."""
        weights = states[self._evaluated]
        try:
            save(weights)
        except StorageError:
            self._unsaved_best = partial(save, {name: tensor.clone() for name, tensor in weights.items()})
            raise
        self._unsaved_best = None

    def _save_unsaved_best(self, _: States) -> None:
        """Write the best model, in the writer's thread, if it could not be written when it was due."""
        if self._unsaved_best:
            self._unsaved_best()
            self._unsaved_best = None

    def _release(self) -> None:
        if self._claim:
            self._claim.release()

    @property
    def _folder(self) -> Path:
        return Path(self._settings.run.out)

    @property
    def _checkpoints(self) -> Path:
        return self._folder / reader.FOLDER
