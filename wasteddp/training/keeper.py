"""Keeps a run: checkpoints for going on, the bundle of the best model for using it, and what it was best at."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn

from wasteddp.errors import CheckpointError, StorageError
from wasteddp.inference.answers import Seen
from wasteddp.model import ema
from wasteddp.model.resnet import running_statistics
from wasteddp.settings import Settings
from wasteddp.training import checkpoints, claim, environment, messages, optim
from wasteddp.training.batch_job import Notice
from wasteddp.training.best_model import card_of, save_best
from wasteddp.training.checkpoint_writer import CheckpointWriter, States, recover, refuse_full_disk
from wasteddp.training.checkpoints import Checkpoint, Progress
from wasteddp.training.claim import Claim
from wasteddp.training.inputs import Inputs
from wasteddp.training.last_words import append_to_log
from wasteddp.training.lineage import Lineage, accepted_changes, changed_settings
from wasteddp.training.runtime import Runtime

SAVE_REQUEST = "SAVE_NOW"  # `touch RUN/SAVE_NOW`: gone once a checkpoint is on the disk
_RANKS = "ranks"  # the state that holds what each rank has of its own
_STATISTICS = "running_statistics"

SaveBest = Callable[[Mapping[str, torch.Tensor]], None]
OfStates = Callable[[States], None]


class Stateful(Protocol):
    """What may be kept beside the model and the optimizer, such as a moving average of the weights."""

    def state_dict(self) -> Mapping[str, torch.Tensor]: ...
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> Any: ...


class Keeper:
    """Hands the state of a run to the writer and back. Made and called on all ranks; rank 0 writes.

    From its making to `__exit__`, or to a refused starting point, no other training can write into the run's folder.

    Args:
        model: bare, or as DDP or `torch.compile` wrap it.
        optimizer: bare, not as Accelerate wraps it.
        further: other things with a state, by the name that their file gets; the same on every rank. Of networks the
            running statistics are each rank's own, as the model's are. One called `ema.STATE` is what is evaluated, so
            it is what the best model is taken from.
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
        self._model: nn.Module = world.accelerator.unwrap_model(model, keep_torch_compile=False)
        self._optimizer, self._further, self._clock = optimizer, further or {}, clock
        networks = {name: thing for name, thing in self._further.items() if isinstance(thing, nn.Module)}
        self._networks: dict[str, nn.Module] = {"model": self._model, **networks}
        self._evaluated = ema.STATE if ema.STATE in self._further else "model"
        self._commit = environment.commit()
        self._writer: CheckpointWriter | None = None
        self._claim: Claim | None = None
        self._saved_at = clock()
        self._owed: Callable[[], None] | None = None  # writes the best model, which could not be written yet
        self._failed = False  # the last save
        self.num_failed, self._stall_ms = 0, 0.0
        self.notice = Notice.of(os.environ)
        with world.together():
            if world.is_main:
                there = sum(path.stat().st_size for path in self._checkpoints.glob("step-*/*"))
                refuse_full_disk(self._folder, self._num_bytes() - there)
                self._claim = Claim(self._checkpoints, world.say, wait_s=claim.WAIT_S)
                recover(self._checkpoints)
                self._writer = CheckpointWriter(
                    self._checkpoints,
                    keep_last=settings.checkpoint.keep_last,
                    keep_every=settings.checkpoint.keep_every,
                )

    def __enter__(self) -> Keeper:
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
                    found = checkpoints.starting_point(self._checkpoints, resume, self._world.say)
            path = self._world.gather(found and found.path)[0]  # all ranks
            with self._world.together():
                if path and not found:
                    found = checkpoints.read(path)
                if found:
                    changes = accepted_changes(found.progress.lineage, lineage, accepted, where=found.path)
                    for line in changes + changed_settings(found.settings_yaml, self._settings):
                        self._world.say(line)
            return found
        except BaseException:
            self._release()
            raise

    def restore(self, checkpoint: Checkpoint) -> None:
        """All ranks, behind `prepare`, which gives every rank the state of the first: the checkpoint's state.

        Raises:
            CheckpointError: on every rank: it lacks a state that this run has.
        """
        with self._world.together():
            if missing := self._further.keys() - checkpoint.states.keys():
                raise CheckpointError(
                    f"{checkpoint.path} has no state of: {', '.join(sorted(missing))}",
                    "the run would go on with a fresh one beside trained weights",
                    "restore the settings of that run, or set run.out to a new folder",
                )
        self._model.load_state_dict(checkpoint.states["model"])
        optim.load_state_tensors(self._optimizer, self._model, checkpoint.states["optimizer"])
        for name, thing in self._further.items():
            thing.load_state_dict(checkpoint.states[name])
        for name, network in self._networks.items():
            own = checkpoint.states.get(_RANKS, {}).get(_own_statistics(name))
            if own is not None and len(own) == self._world.world_size:  # another number of ranks takes the mean
                _fill(running_statistics(network), own[self._world.rank])
        self._world.load_scaler(checkpoint.progress.scaler)

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

    def reconcile(self) -> None:
        """All ranks: BatchNorm's running statistics become their mean, since each rank saw other images."""
        self._world.average_([tensor for network in self._networks.values() for tensor in running_statistics(network)])

    def save(self, progress: Progress, *, epoch: int, best: Seen | None) -> float:
        """All ranks: keeps this state. Returns the ms that the loop waited.

        Args:
            best: what its evaluation saw, if this is the best model so far: it then becomes the run's model.

        The state of the ranks is not touched: when a run is saved must not change what comes of it. If the save before
        this one failed, for want of space or permission, that is told and counted, and this one is the next try: what
        was complete before is untouched.
        """
        began = time.perf_counter()
        states = self._states()  # all ranks
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
                    replace(progress, scaler=scaler.state_dict() if scaler else None),
                    states,
                    self._settings.to_yaml(),
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
            StorageError: on every rank, if it is not, and was not when it was tried once more.
        """
        with self._world.together():
            self._insist()

    def close(self) -> None:
        """All ranks: until everything is on the disk.

        Raises:
            StorageError: on every rank, if the last save failed, and again when it was tried once more.
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
            message = messages.not_saved(error)
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

    def _states(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """All ranks: what a checkpoint holds. The networks' running statistics are the mean over the ranks, for any
        number of them to load; each rank's own are kept beside it, so that the same number goes on bit for bit."""
        states: dict[str, Mapping[str, torch.Tensor]] = {
            "model": self._model.state_dict(),
            "optimizer": optim.state_tensors(self._optimizer, self._model),
            **{name: thing.state_dict() for name, thing in self._further.items()},
        }
        if self._world.world_size == 1:
            return states
        of_ranks = {}
        for name, network in self._networks.items():
            if own := running_statistics(network):
                flat_RF = self._world.stack(torch.cat([tensor.reshape(-1) for tensor in own]))  # all ranks
                means = [torch.empty_like(tensor) for tensor in own]
                _fill(means, flat_RF.mean(0))
                names = {id(buffer): key for key, buffer in network.named_buffers()}
                states[name] = {**states[name], **{names[id(t)]: mean for t, mean in zip(own, means, strict=True)}}
                of_ranks[_own_statistics(name)] = flat_RF
        return {**states, _RANKS: of_ranks} if of_ranks else states

    def _num_bytes(self) -> int:
        return room_for_run(self._settings, sum(tensor.nbytes for tensor in self._model.state_dict().values()))

    @property
    def _folder(self) -> Path:
        return Path(self._settings.run.out)

    @property
    def _checkpoints(self) -> Path:
        return self._folder / "checkpoints"


def room_for_checkpoint(settings: Settings, model_bytes: int) -> int:
    """Bytes of one: the weights, their average, and one more for each moment that the optimizer keeps."""
    moments = 1 if settings.optimizer.name in ("sgd", "lars") else 2
    return model_bytes * (1 + (settings.train.ema_decay > 0) + moments)


def room_for_run(settings: Settings, model_bytes: int) -> int:
    """Bytes that checkpoints and bundles take at most: those kept, the best, and the ones being written."""
    return room_for_checkpoint(settings, model_bytes) * (settings.checkpoint.keep_last + 2) + 2 * model_bytes


def _own_statistics(name: str) -> str:
    """What the ranks' own running statistics of a network are called."""
    return _STATISTICS if name == "model" else f"{name}_{_STATISTICS}"


def _fill(tensors: list[torch.Tensor], flat: torch.Tensor) -> None:
    """Writes the parts of `flat`, one behind the other, into the tensors."""
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
