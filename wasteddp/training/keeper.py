"""Keeps a run: checkpoints for going on, the bundle of the best model for using it, and what it was best at."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from wasteddp import __version__
from wasteddp.data.images import MEAN_RGB, STD_RGB
from wasteddp.errors import StorageError
from wasteddp.inference.answers import Seen
from wasteddp.inference.bundle import BundleCard, Hashes, Preprocessing, Trained, save_bundle
from wasteddp.inference.evaluation_record import save_seen
from wasteddp.model.resnet import running_statistics
from wasteddp.settings import Settings
from wasteddp.training import checkpoints, environment, messages, optim
from wasteddp.training.batch_job import Notice
from wasteddp.training.checkpoints import CheckpointWriter, Progress
from wasteddp.training.inputs import Inputs
from wasteddp.training.last_words import append_to_log
from wasteddp.training.runtime import Runtime


class Keeper:
    """Hands the state of a run to the writer. Made and called on all ranks; rank 0 writes.

    Args:
        model: bare, not as DDP wraps it.
        optimizer: bare, not as Accelerate wraps it.
    """

    def __init__(
        self, settings: Settings, world: Runtime, data: Inputs, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self._settings, self._world, self._data = settings, world, data
        self._model, self._optimizer = model, optimizer
        self._commit = environment.commit()
        self._writer: CheckpointWriter | None = None
        self._owed: tuple[BundleCard, Seen, Mapping[str, torch.Tensor]] | None = None  # the best, not yet on the disk
        self._failed = False  # the last save
        self.num_failed = 0
        self.notice = Notice.of(os.environ)
        with world.together():
            if world.is_main:
                there = sum(path.stat().st_size for path in self._folder.glob("checkpoints/step-*/*"))
                checkpoints.refuse_full_disk(self._folder, self._num_bytes() - there)
                self._writer = CheckpointWriter(Path(settings.run.out) / "checkpoints", settings.checkpoint.keep_last)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error: what was handed over is still written; how that ends matters less than the error."""
        if self._writer:
            with suppress(StorageError):
                self._writer.close()

    def reconcile(self) -> None:
        """All ranks: BatchNorm's running statistics become their mean, since each rank saw other images."""
        self._world.average_(running_statistics(self._model))

    def save(self, progress: Progress, *, epoch: int, best: Seen | None) -> float:
        """All ranks: keeps this state. Returns the ms that the loop waited.

        If the save before this one failed, for want of space or permission, that is told and counted, and this one is
        the next try: what was complete before is untouched.

        Args:
            best: what its evaluation saw, if this is the best model so far: it then becomes the run's model.
        """
        began = time.perf_counter()
        self.reconcile()
        with self._world.together():
            if self._writer:
                self._settle()
                scaler = self._world.accelerator.scaler
                owed = (self._card(progress, epoch), best) if best else None
                model: Callable[[Mapping[str, torch.Tensor]], object]
                model = partial(self._save_model, *owed) if owed else self._save_owed
                self._writer.save(
                    replace(progress, scaler=scaler.state_dict() if scaler else None),
                    self._model.state_dict(),
                    optim.state_tensors(self._optimizer, self._model),
                    self._settings.to_yaml(),
                    first=model,
                )
        if self.notice.is_measuring:
            with self._world.together():
                if self._writer:
                    self._writer.wait()
            self.notice.save_s = time.perf_counter() - began
        return 1000 * (time.perf_counter() - began)

    def close(self) -> None:
        """All ranks: until everything is on the disk.

        Raises:
            StorageError: on every rank, if the last save failed, and again when it was tried once more.
        """
        with self._world.together():
            if self._writer:
                self._settle()
                if self._failed:
                    self._writer.again()
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

    def _save_owed(self, _: Mapping[str, torch.Tensor]) -> None:
        """In the writer's thread: the best model, if it could not be written when it was due."""
        if self._owed:
            self._save_model(*self._owed)

    def _save_model(self, card: BundleCard, seen: Seen, weights: Mapping[str, torch.Tensor]) -> None:
        """In the writer's thread: the best model. One that cannot be written waits in memory for the next save."""
        try:
            self._write_model(card, seen, weights)
        except StorageError:
            self._owed = card, seen, {name: tensor.clone() for name, tensor in weights.items()}
            raise
        self._owed = None

    def _write_model(self, card: BundleCard, seen: Seen, weights: Mapping[str, torch.Tensor]) -> None:
        """The bundle, then what it was measured at."""
        card = save_bundle(self._folder / "model", card, weights)
        save_seen(
            self._folder / "evaluations" / seen.split,
            seen,
            self._data.val_reader.source,
            card,
            manifest_sha256=self._data.manifest.sha256,
            options={
                "split": seen.split,
                "shards": self._settings.data.shards,
                "by": "training",
                "precision": self._world.precision,
                "device": self._world.device.type,
            },
        )

    def _num_bytes(self) -> int:
        return room_for_run(self._settings, sum(tensor.nbytes for tensor in self._model.state_dict().values()))

    @property
    def _folder(self) -> Path:
        return Path(self._settings.run.out)

    def _card(self, progress: Progress, epoch: int) -> BundleCard:
        settings = self._settings
        return BundleCard(
            arch=settings.model.arch,
            classes=self._data.manifest.classes,
            preprocessing=Preprocessing(
                image_size_px=settings.data.image_size,
                resize_px=settings.data.eval_resize_px,
                mean=MEAN_RGB,
                std=STD_RGB,
            ),
            trained=Trained(
                step=progress.step, epoch=epoch, metric=settings.evaluate.metric, value=progress.best_value or 0.0
            ),
            hashes=Hashes(
                manifest=self._data.manifest.sha256,
                settings=hashlib.sha256(settings.to_yaml().encode()).hexdigest(),
                code=self._commit,
            ),
            tool=f"wasteddp {__version__}",
            bins=dict(self._data.manifest.bins),
        )


def room_for_checkpoint(settings: Settings, model_bytes: int) -> int:
    """Bytes of one: the weights, and one more for each moment that the optimizer keeps."""
    return model_bytes * (2 if settings.optimizer.name == "sgd" else 3)


def room_for_run(settings: Settings, model_bytes: int) -> int:
    """Bytes that checkpoints and bundles take at most: those kept, the best, and the ones being written."""
    return room_for_checkpoint(settings, model_bytes) * (settings.checkpoint.keep_last + 2) + 2 * model_bytes
