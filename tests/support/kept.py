"""Checkpoints of a few numbers, for the tests of their writer, reader and manager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from wasteddp.training.checkpoint.progress import Lineage, Progress
from wasteddp.training.checkpoint.reader import States, listed, step_of
from wasteddp.training.checkpoint.writer import CheckpointWriter

LINEAGE = Lineage("m" * 64, ("glass", "paper"), "resnet18", 0, 32, 32, 1, 0, "train", 64, "sgd")


def tensors(step: int) -> dict[str, torch.Tensor]:
    image = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4) + step
    return {"conv.weight": image.to(memory_format=torch.channels_last), "bn.num_batches_tracked": torch.tensor(step)}


def states_of(step: int) -> States:
    return {"model": tensors(step), "optimizer": {"momentum_buffer:conv.weight": torch.ones(3)}}


def save(
    folder: Path,
    *steps: int,
    keep_last: int = 10,
    keep_every: int = 0,
    best_step: int = 0,
    states: States | None = None,
    after: Callable[[], object] | None = None,
) -> None:
    """Save a checkpoint of each step, in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = CheckpointWriter(folder, keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        progress = Progress(LINEAGE, step=step, best_value=0.5, best_step=best_step, tracker_id="abc")
        writer.save(progress, states or states_of(step), "a: 1\n", after=after)
    writer.close()


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in listed(folder)]
