"""Losses and times between two rows of metrics. Losses stay on the device until a row is due: no sync before."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from wasteddp.data.loader import Batch
from wasteddp.training.runtime import Runtime


class Meter:
    """Counts from one `read` to the next. `device` is where the losses are."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), device=device)
        self._steps, self._waited_s, self._since = 0, 0.0, time.perf_counter()

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the time spent waiting for each counted."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self._waited_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def add(self, loss: torch.Tensor) -> None:
        """This rank's part of a step's mean loss: a micro-batch's mean over the accumulation."""
        self._loss += loss.detach()

    @property
    def num_steps(self) -> int:
        """Steps since the last row."""
        return self._steps

    def step_done(self) -> None:
        self._steps += 1

    def read(self, world: Runtime, global_batch: int) -> dict[str, float]:
        """All ranks: the "train/..." metrics since the last row; starts anew."""
        seconds, steps = max(time.perf_counter() - self._since, 1e-9), max(self._steps, 1)
        waited_s = self._waited_s
        loss = float(world.sum(self._loss)) / (steps * world.world_size)  # all ranks
        self.restart()
        return {
            "train/loss": loss,
            "train/step_ms": 1000 * seconds / steps,
            "train/images_per_s": global_batch * steps / seconds,
            "train/wait_fraction": waited_s / seconds,
        }

    def restart(self) -> None:
        """Forgets the time since the last row: an evaluation is no training."""
        self._loss = torch.zeros_like(self._loss)
        self._steps, self._waited_s, self._since = 0, 0.0, time.perf_counter()
