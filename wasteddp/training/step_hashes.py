"""steps.jsonl: what each step was made of, so that two runs that must be the same can be compared line by line.

With `run.record_steps`, a line a step: {"step": 7, "samples": hash of the sample numbers in the plan's order,
"images": hash of the decoded and cropped bytes, in the same order, "weights": hash of the parameters after the step}.
Samples and images are the same at any number of ranks; the weights are at the same number. Losses and learning rates
are in metrics.jsonl, for each step with train.log_every_steps 1. It costs the copy of the parameters to the host and a
hash of them at each step: for `wasteddp verify-resume` and tests, not for long runs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from wasteddp.data.batch import Batch
from wasteddp.settings import Settings
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.tracking.tracker import roll_back

STEPS = "steps.jsonl"
_HEX_DIGITS = 16


class StepHashes:
    """Writes the lines; nothing if the setting is off. Lines after `resumed_step` are rolled back first.

    Args:
        resumed_step: the steps done when the run starts.
    """

    def __init__(self, settings: Settings, world: Runtime, resumed_step: int) -> None:
        self._is_on, self._world = settings.run.record_steps, world
        self._path = Path(settings.run.out) / STEPS
        if self._is_on and world.is_main:
            roll_back(self._path, resumed_step)

    def add(self, step: int, batch: Batch, model: nn.Module) -> None:
        """All ranks, after the optimizer's step.

        Args:
            step: optimizer steps done, this one included.
            batch: this rank's part.
            model: bare.
        """
        if not self._is_on:
            return
        own = batch.samples.tobytes(), b"".join(_digest(image) for image in batch.images_BCHW)
        parts = self._world.gather(own)  # all ranks, in the order of their lanes: together the order of one rank
        if self._world.is_main:
            samples, images = (hashlib.sha256(b"".join(column)) for column in zip(*parts, strict=True))
            row = {
                "step": step,
                "samples": samples.hexdigest()[:_HEX_DIGITS],
                "images": images.hexdigest()[:_HEX_DIGITS],
                "weights": weights_hash(model)[:_HEX_DIGITS],
            }
            with self._path.open("a", encoding="utf-8") as file:  # closed, so a kill can cut no line before this one
                file.write(json.dumps(row) + "\n")


def weights_hash(model: nn.Module) -> str:
    """sha256 of all parameters in their order."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(_digest(parameter.detach()))
    return found.hexdigest()


def _digest(tensor: torch.Tensor) -> bytes:
    """sha256 of a tensor's numbers in the order of its axes, however it lies in memory."""
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).digest()
