"""Keeps a run: checkpoints for going on, the bundle of the best model for using it, and what it was best at."""

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
from wasteddp.inference.reliability import Seen
from wasteddp.model import ema
from wasteddp.settings import Settings
from wasteddp.training import messages
from wasteddp.training.checkpoint import reader
from wasteddp.training.checkpoint.best_model import card_of, save_best
from wasteddp.training.checkpoint.compatibility import (
    Lineage,
    accepted_changes,
    changed_settings,
    refuse_finished,
)
from wasteddp.training.checkpoint.reader import Checkpoint, Progress, States
from wasteddp.training.checkpoint.state import RunState, Stateful, room_for_run
from wasteddp.training.checkpoint.writer import CheckpointWriter, recover, refuse_full_disk
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.watchdog.hard_exit import append_to_log
from wasteddp.training.watchdog.slurm import Notice

SAVE_REQUEST = "SAVE_NOW"  # `touch RUN/SAVE_NOW`: gone once a checkpoint is on the disk

SaveBest = Callable[[Mapping[str, torch.Tensor]], None]
OfStates = Callable[[States], None]


class CheckpointManager:
    """Hands the state of a run to the writer and back. Made and called on all ranks; rank 0 writes.

    From its making to `__exit__`, or to a refused starting point, no other training can write into the run's folder.

    Args:
        model, optimizer, further: see `RunState`. What is called `ema.STATE` among the further things is what is
            evaluated, so it is what the best model is taken from.
        clock: seconds, for checkpoint.every_minutes; only rank 0's counts.
    """

    def __init__(
        self,
        settings: Settings,
        world: Runtime,
        data: Inputs,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        further: Mapping[str, Stateful] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._world, self._data = settings, world, data
        self.state = RunState(world, model, optimizer, further or {})
        self._clock = clock
        self._evaluated = ema.STATE if further and ema.STATE in further else "model"
        self._commit = environment.commit()
        self._settings_yaml = settings.to_yaml()  # once: it takes 5 to 8 ms, for which the loop would wait
        self._writer: CheckpointWriter | None = None
        self._claim: RunLock | None = None
        self._saved_at = clock()
        self._owed: Callable[[], None] | None = None  # writes the best model, which could not be written yet
        self._failed = False  # the last save
        self.num_failed, self._stall_ms = 0, 0.0
        self.changes: list[str] = []  # from the checkpoint that the run continues from to this start, a line each
        self.notice = Notice.of(os.environ)
        with world.together():
            if world.is_main:
                there = sum(path.stat().st_size for path in self._checkpoints.glob("step-*/*"))
                refuse_full_disk(self._folder, room_for_run(settings, self.state.model_bytes) - there)
                self._claim = RunLock(self._checkpoints, world.say, wait_s=LOCK_WAIT_S)
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
        if self._writer:  # after an error: what was handed over is still written; how that ends matters less
            with suppress(StorageError):
                self._writer.close()
        self._release()

    def starting_point(self, resume: str, accepted: Collection[str], *, lineage: Lineage) -> Checkpoint | None:
        """All ranks: the checkpoint to go on from, the one that rank 0 chooses; None to begin at the beginning.

        Args:
            resume: "auto", "never" or a checkpoint's path.
            accepted: what of the lineage may differ from the checkpoint's.
            lineage: of this run.

        Raises:
            CheckpointError: on every rank: none can be had, or it belongs to another run.
        """
        try:
            found: Checkpoint | None = None
            with self._world.together():
                if self._world.is_main:
                    found = reader.starting_point(self._checkpoints, resume, self._world.say)
            path = self._world.gather(found and found.path)[0]  # all ranks
            with self._world.together():
                if path and not found:
                    found = reader.read(path)
                if found:
                    changes = accepted_changes(found.progress.lineage, lineage, accepted, where=found.path)
                    self.changes = changes + changed_settings(found.settings_yaml, self._settings)
            return found
        except BaseException:
            self._release()
            raise

    def refuse_changes_of_a_finished_run(self, changes: Sequence[str], *, step: int) -> None:
        """All ranks: see `compatibility.refuse_finished`."""
        try:
            refuse_finished(changes, run=self._settings.run.out, step=step)
        except CheckpointError:
            self._release()
            raise

    @property
    def metrics(self) -> dict[str, float]:
        """The "checkpoint/..." metrics, on rank 0; `checkpoint/seconds` once a save has ended."""
        seconds = self._writer.seconds if self._writer else None
        row = {"checkpoint/stall_ms": self._stall_ms, "checkpoint/failed": self.num_failed}
        return row if seconds is None else {**row, "checkpoint/seconds": seconds}

    def asks(self) -> bool:
        """Whether a save is due by the clock, or was asked for by the file SAVE_NOW. False on all ranks but the first,
        whose clock and disk decide, and while a checkpoint is being written: nobody would gain by waiting for it."""
        if not self._writer or self._writer.is_busy:
            return False
        every_s = 60 * self._settings.checkpoint.every_minutes
        return (every_s > 0 and self._clock() - self._saved_at >= every_s) or (self._folder / SAVE_REQUEST).exists()

    def save(self, progress: Progress, *, epoch: int, best: Seen | None) -> float:
        """All ranks: keeps this state. Returns the ms that the loop waited.

        Args:
            best: what its evaluation saw, if this is the best model so far: it then becomes the run's model.

        The state of the ranks is not touched: when a run is saved must not change what comes of it. If the save before
        this one failed, for want of space or permission, that is told and counted, and this one is the next try: what
        was complete before is untouched.
        """
        began = time.perf_counter()
        states = self.state.tensors()  # all ranks
        with self._world.together():
            if self._writer:
                self._settle()
                scaler, request = self._world.accelerator.scaler, self._folder / SAVE_REQUEST
                keep_best: OfStates = self._save_owed
                if best:
                    settings, data = self._settings, self._data
                    card = card_of(settings, data.manifest, progress, epoch=epoch, commit=self._commit)
                    save = partial(save_best, card=card, seen=best, settings=settings, world=self._world, data=data)
                    keep_best = partial(self._save_best, save)
                self._writer.save(
                    replace(
                        progress,
                        scaler=scaler.state_dict() if scaler else None,
                        precision=self._world.precision,
                        compiles=self._world.compiles,
                    ),
                    states,
                    self._settings_yaml,
                    before=keep_best,
                    after=(lambda: request.unlink(missing_ok=True)) if request.exists() else None,
                )
                self._saved_at = self._clock()
        if self.notice.is_measuring:
            with self._world.together():
                if self._writer:
                    self._writer.wait()
            self.notice.save_s = time.perf_counter() - began
        self._stall_ms = 1000 * (time.perf_counter() - began)
        return self._stall_ms

    def drain(self) -> None:
        """All ranks: until what was handed over is on the disk.

        Raises:
            StorageError: on every rank, if it is not, and was not when it was tried again.
        """
        with self._world.together():
            self._insist()

    def close(self) -> None:
        """All ranks: until everything is on the disk.

        Raises:
            StorageError: on every rank, if the last save failed, and again when it was tried again.
        """
        with self._world.together():
            self._insist()
            if self._writer:
                self._writer.close()

    def _settle(self) -> None:
        """Rank 0: until the save before this is on the disk, or has failed, which is said loudly."""
        self._failed = False
        try:
            if self._writer:
                self._writer.wait()
        except StorageError as error:
            self._failed = True
            self.num_failed += 1
            self._say(messages.not_saved(error))

    def _say(self, message: str) -> None:
        self._world.say(message)
        append_to_log(self._folder, message)

    def _insist(self) -> None:
        self._settle()
        if self._writer and self._failed:
            self._writer.again()
            self._writer.wait()
            self._failed = False

    def _save_best(self, save: SaveBest, states: States) -> None:
        """In the writer's thread: the best model. One that cannot be written waits in memory for the next save."""
        weights = states[self._evaluated]
        try:
            save(weights)
        except StorageError:
            self._owed = partial(save, {name: tensor.clone() for name, tensor in weights.items()})
            raise
        self._owed = None

    def _save_owed(self, _: States) -> None:
        """In the writer's thread: the best model, if it could not be written when it was due."""
        if self._owed:
            self._owed()
            self._owed = None

    def _release(self) -> None:
        if self._claim:
            self._claim.release()

    @property
    def _folder(self) -> Path:
        return Path(self._settings.run.out)

    @property
    def _checkpoints(self) -> Path:
        return self._folder / reader.FOLDER
