"""Which samples are in which step: pure arithmetic on (seed, epoch, step). No torch, no clock, no process group.

Legend: N samples of the split, numbered through all its shards; G global batch; P lanes; R ranks; B block;
W window; T steps of an epoch; L = T * G / P samples of a lane.

The samples of the split in a keyed order are cut into P lanes of L samples. Step k takes the next G / P samples of
every lane, and rank r of R owns the lanes [r * P / R, (r + 1) * P / R). So the samples of a step are the same for every
R that divides P, and a rank computes its own part of any step without knowing the others'.

    lane 0   s s s s s s s s s s     rank 0 owns the lanes 0 .. P/R - 1
    lane 1   s s s s s s s s s s
    ...          |  |
                 step k takes this column: G samples

Nothing is stored: a permutation is a keyed Feistel network evaluated at the positions that are asked for, so seeking
into any epoch and step costs the same as starting, and memory does not grow with N.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wasteddp.data.draws import BLOCKS, I64, WINDOW, permute
from wasteddp.errors import SettingsError

PADDING = -1


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """The order of training samples.

    Args:
        num_samples: N.
        global_batch: G.
        seed: with the epoch, the only source of the order.
        lanes: P, a divisor of G. The default, G itself, allows every number of ranks that divides G.
        block: B samples that lie side by side in the shards are read one after another. 1 is a uniform permutation.
        window: W samples of a lane are shuffled among each other, so that a block does not stay in one step's
            neighbourhood; 0 or 1 is none. Needed only where `block` is larger than 1.
    """

    num_samples: int
    global_batch: int
    seed: int
    lanes: int
    block: int = 1
    window: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch:
            raise SettingsError(
                f"the training split has {self.num_samples} samples and train.batch_size is {self.global_batch}",
                "an epoch would have no step",
                f"set train.batch_size to {self.num_samples} or less",
            )
        if self.lanes < 1 or self.global_batch % self.lanes:
            raise SettingsError(
                f"data.lanes is {self.lanes} and train.batch_size is {self.global_batch}",
                "a step could not take the same number of samples from every lane",
                "set data.lanes to a divisor of train.batch_size, or to 0",
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    @property
    def left_out_per_epoch(self) -> int:
        """Samples that do not fill a global batch: others in each epoch."""
        return self.num_samples - self.steps_per_epoch * self.global_batch

    def step_samples(self, epoch: int, step_in_epoch: int, *, rank: int = 0, world_size: int = 1) -> I64:
        """Sample numbers of one rank's part of a step: int64 [G / R], lane by lane."""
        if self.lanes % world_size:
            raise SettingsError(
                f"{world_size} processes and {self.lanes} lanes",
                "the lanes could not be dealt out evenly",
                f"start a number of processes that divides {self.lanes}",
            )
        lanes_per_rank = self.lanes // world_size
        lane = np.arange(rank * lanes_per_rank, (rank + 1) * lanes_per_rank, dtype=np.int64)
        per_lane = self.global_batch // self.lanes
        in_lane = np.arange(step_in_epoch * per_lane, (step_in_epoch + 1) * per_lane, dtype=np.int64)
        # [lanes of the rank, samples a lane] -> [G / R]
        lane_2d, in_lane_2d = np.broadcast_arrays(lane[:, None], in_lane[None, :])
        return self._sample(epoch, lane_2d.reshape(-1), in_lane_2d.reshape(-1))

    def _sample(self, epoch: int, lane: I64, in_lane: I64) -> I64:
        lane_length = self.steps_per_epoch * self.global_batch // self.lanes
        if self.window > 1:
            window = in_lane // self.window
            size = np.minimum(self.window, lane_length - window * self.window)
            shuffled = permute(in_lane % self.window, size, WINDOW, self.seed, epoch, lane, window)
            in_lane = window * self.window + shuffled
        position = lane * lane_length + in_lane  # 0 .. T * G - 1 in the epoch's order
        # The split is a ring cut into full blocks from an epoch's own starting point; the ring's last, short block is
        # at the order's end, so what an epoch leaves out is a different remainder each time.
        num_blocks = self.num_samples // self.block
        block, within = position // self.block, position % self.block
        full = block < num_blocks
        # max: where the block is longer than the split there is no full one, and a permutation of none has no end
        place = permute(np.where(full, block, 0), max(num_blocks, 1), BLOCKS, self.seed, epoch)
        ring = np.where(full, place * self.block + within, position)
        if self.block == 1:
            return ring
        start = permute(np.zeros((), np.int64), self.num_samples, BLOCKS, self.seed, epoch, 1)
        return (ring + start) % self.num_samples


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Every sample once, in the shards' order, padded so that all ranks have the same number of full batches.

    Args:
        batch: samples that one rank sees at once.
    """

    num_samples: int
    batch: int

    def num_batches(self, world_size: int = 1) -> int:
        """Batches of each rank."""
        return -(-self.num_samples // (self.batch * world_size))

    def batch_samples(self, number: int, *, rank: int = 0, world_size: int = 1) -> I64:
        """Sample numbers of one rank's batch: int64 [batch], `PADDING` where the split has ended."""
        first = (number * world_size + rank) * self.batch
        samples = np.arange(first, first + self.batch, dtype=np.int64)
        return np.where(samples < self.num_samples, samples, PADDING)


def micro_batch(*, global_batch: int, world_size: int, max_micro_batch: int) -> tuple[int, int]:
    """Solves G = ranks x micro-batch x accumulation for the largest micro-batch allowed.

    Returns:
        (micro-batch, accumulation)

    Raises:
        SettingsError: the number of ranks does not divide G; the message names the numbers that do.
    """
    if global_batch % world_size:
        fitting = [r for r in range(1, min(global_batch, 4 * world_size) + 1) if global_batch % r == 0]
        below, above = global_batch // world_size * world_size, -(-global_batch // world_size) * world_size
        raise SettingsError(
            f"train.batch_size is {global_batch} and there are {world_size} processes",
            "the global batch cannot be cut into equal parts, and the ranks' gradients would weigh differently",
            f"set train.batch_size to {' or '.join(str(n) for n in (below, above) if n)}, "
            f"or start {', '.join(map(str, fitting))} processes",
        )
    per_rank = global_batch // world_size
    size = next(m for m in range(min(per_rank, max_micro_batch), 0, -1) if per_rank % m == 0)
    return size, per_rank // size
