"""What the ranks of this machine are going to read: for a cache that they share.

Legend: R ranks. All of it is arithmetic on the plan; a local set never asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from wasteddp.data.dataset import Needs
from wasteddp.data.reader import SplitReader
from wasteddp.order.keyed_random import I64
from wasteddp.order.plan import EvaluationPlan, TrainPlan

_MOMENTS = 64  # looked at, evenly spread over the run


@dataclass(frozen=True, slots=True)
class CacheForecast:
    """Training and evaluation as the ranks `ranks` of `world_size` read them."""

    train_plan: TrainPlan
    train_reader: SplitReader
    val_plan: EvaluationPlan
    val_reader: SplitReader
    evaluate_every: int  # steps
    rank: int
    ranks: range  # of this machine
    world_size: int

    def others(self, first_step: int, last_step: int) -> Iterator[frozenset[str]]:
        """For each step of the run, the shards that others need in it: other ranks of this machine, and evaluations."""
        val = frozenset(self.val_reader.needs(np.arange(self.val_plan.num_samples)))
        for step in range(first_step, last_step):
            ranks = (rank for rank in self.ranks if rank != self.rank)
            needed = frozenset(shard for rank in ranks for shard in self.train_reader.needs(self._train(step, rank)))
            evaluates = (step + 1) % self.evaluate_every == 0 or step + 1 == last_step
            yield needed | val if evaluates else needed

    def train_windows(self, num_steps: int, in_flight: int) -> Iterator[Needs]:
        """What the machine holds at once in training, at some moments of a run of `num_steps`."""
        return self._windows(self.train_reader, self._train, num_steps, in_flight)

    def val_windows(self, in_flight: int) -> Iterator[Needs]:
        """The same for an evaluation."""

        def samples(number: int, rank: int) -> I64:
            return self.val_plan.batch_samples(number, rank=rank, world_size=self.world_size)

        return self._windows(self.val_reader, samples, self.val_plan.num_batches(self.world_size), in_flight)

    def _train(self, step: int, rank: int) -> I64:
        epoch, step_in_epoch = divmod(step, self.train_plan.steps_per_epoch)
        return self.train_plan.step_samples(epoch, step_in_epoch, rank=rank, world_size=self.world_size)

    def _windows(
        self, reader: SplitReader, samples: Callable[[int, int], I64], num_steps: int, in_flight: int
    ) -> Iterator[Needs]:
        for first in np.unique(np.linspace(0, max(0, num_steps - in_flight), _MOMENTS, dtype=np.int64)).tolist():
            steps = range(first, min(first + in_flight, num_steps))
            yield reader.needs(np.concatenate([samples(step, rank) for step in steps for rank in self.ranks]))


def ranks_here(rank: int, world_size: int) -> range:
    """The ranks of this machine, as launchers number them: side by side."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size > 1 else 1
    first = rank - int(os.environ.get("LOCAL_RANK", "0")) if world_size > 1 else 0
    return range(first, first + here)
