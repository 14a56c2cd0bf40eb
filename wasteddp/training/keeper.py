"""Keeps a run: checkpoints for going on, the bundle of the best model for using it, and what it was best at."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from wasteddp import __version__
from wasteddp.data.images import MEAN_RGB, STD_RGB
from wasteddp.inference.answers import Seen
from wasteddp.inference.bundle import BundleCard, Hashes, Preprocessing, Trained, save_bundle
from wasteddp.inference.evaluation_record import save_seen
from wasteddp.model.resnet import running_statistics
from wasteddp.settings import Settings
from wasteddp.training import checkpoints, environment, optim
from wasteddp.training.batch_job import Notice
from wasteddp.training.checkpoints import CheckpointWriter, Progress
from wasteddp.training.inputs import Inputs
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
        self.notice = Notice.of(os.environ)
        with world.together():
            if world.is_main:
                checkpoints.refuse_full_disk(self._folder, self._num_bytes())
                self._writer = CheckpointWriter(Path(settings.run.out) / "checkpoints", settings.checkpoint.keep_last)

    def reconcile(self) -> None:
        """All ranks: BatchNorm's running statistics become their mean, since each rank saw other images."""
        self._world.average_(running_statistics(self._model))

    def save(self, progress: Progress, *, epoch: int, best: Seen | None) -> float:
        """All ranks: keeps this state. Returns the ms that the loop waited.

        Args:
            best: what its evaluation saw, if this is the best model so far: it then becomes the run's model.

        Raises:
            StorageError: on every rank, if the save before this one failed.
        """
        began = time.perf_counter()
        self.reconcile()
        with self._world.together():
            if self._writer:
                scaler = self._world.accelerator.scaler
                model = partial(self._save_model, self._card(progress, epoch), best) if best else None
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
            StorageError: on every rank, if the last save failed.
        """
        with self._world.together():
            if self._writer:
                self._writer.close()

    def _save_model(self, card: BundleCard, seen: Seen, weights: Mapping[str, torch.Tensor]) -> None:
        """The bundle, then what it was measured at: in the writer's thread."""
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
        """What the run's checkpoints and bundle take at most: those kept, the best, and the one being written."""
        model: int = sum(tensor.nbytes for tensor in self._model.state_dict().values())
        checkpoint = model * (2 if self._settings.optimizer.name == "sgd" else 3)
        return checkpoint * (self._settings.checkpoint.keep_last + 2) + 2 * model

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
