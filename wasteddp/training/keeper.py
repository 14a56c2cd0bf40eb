"""Keeps a run: checkpoints for going on, and the bundle of the best model for using it."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from wasteddp import __version__
from wasteddp.data.images import MEAN_RGB, STD_RGB
from wasteddp.data.manifest import Manifest
from wasteddp.inference.bundle import BundleCard, Hashes, Preprocessing, Trained, save_bundle
from wasteddp.model.resnet import running_statistics
from wasteddp.settings import Settings
from wasteddp.training import checkpoints, environment, optim
from wasteddp.training.checkpoints import CheckpointWriter, Progress
from wasteddp.training.runtime import Runtime


class Keeper:
    """Hands the state of a run to the writer. Made and called on all ranks; rank 0 writes.

    Args:
        model: bare, not as DDP wraps it.
        optimizer: bare, not as Accelerate wraps it.
    """

    def __init__(
        self, settings: Settings, world: Runtime, manifest: Manifest, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self._settings, self._world, self._manifest = settings, world, manifest
        self._model, self._optimizer = model, optimizer
        self._commit = environment.commit()
        self._writer: CheckpointWriter | None = None
        with world.together():
            if world.is_main:
                checkpoints.refuse_full_disk(self._folder, self._num_bytes())
                self._writer = CheckpointWriter(Path(settings.run.out) / "checkpoints", settings.checkpoint.keep_last)

    def reconcile(self) -> None:
        """All ranks: BatchNorm's running statistics become their mean, since each rank saw other images."""
        self._world.average_(running_statistics(self._model))

    def save(self, progress: Progress, *, epoch: int, best: bool) -> float:
        """All ranks: keeps this state, and as the run's model if it is the best. Returns the ms that the loop waited.

        Raises:
            StorageError: on every rank, if the save before this one failed.
        """
        began = time.perf_counter()
        self.reconcile()
        with self._world.together():
            if self._writer:
                scaler = self._world.accelerator.scaler
                card = self._card(progress, epoch)
                self._writer.save(
                    replace(progress, scaler=scaler.state_dict() if scaler else None),
                    self._model.state_dict(),
                    optim.state_tensors(self._optimizer, self._model),
                    self._settings.to_yaml(),
                    first=(lambda weights: save_bundle(self._folder / "model", card, weights)) if best else None,
                )
        return 1000 * (time.perf_counter() - began)

    def close(self) -> None:
        """All ranks: until everything is on the disk.

        Raises:
            StorageError: on every rank, if the last save failed.
        """
        with self._world.together():
            if self._writer:
                self._writer.close()

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
            classes=self._manifest.classes,
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
                manifest=self._manifest.sha256,
                settings=hashlib.sha256(settings.to_yaml().encode()).hexdigest(),
                code=self._commit,
            ),
            tool=f"wasteddp {__version__}",
            bins=dict(self._manifest.bins),
        )
