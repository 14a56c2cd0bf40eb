"""Which samples are in which step: pure arithmetic on (seed, epoch, step). No torch, no clock, no process group.

Legend: N samples of the split, numbered through all its S shards; G global batch; P lanes; R ranks; B block;
W window; T steps in an epoch; L = T * G / P samples in a lane; F full blocks; Q rests.

The samples of the split, in a keyed order, are cut into P lanes of L samples. Step k takes the next G / P samples of
every lane, and rank r of R owns the lanes [r * P / R, (r + 1) * P / R). So the samples of a step are the same for every
R that divides P, and a rank computes its own part of any step without the parts of the other ranks.

    lane 0   s s s s s s s s s s     rank 0 owns the lanes 0 .. P/R - 1
    lane 1   s s s s s s s s s s
    ...          |  |
                 step k takes this column: G samples

The order is not stored: a permutation is a keyed Feistel network, evaluated only at the positions that are needed. So
starting at any epoch and step costs the same as starting at the first, and memory does not grow with N.

In block mode, blocks of neighbouring samples are read one after another in a keyed order. Each shard is cut into full
blocks of B samples and, if B does not divide its size, a shorter rest. No block spans two shards, so a block needs only
one shard. Blocks and rests are shuffled together. A keyed permutation gives the rests, at most one a shard, their
places among the F + Q; a sorted table keeps them. The full blocks fill the other places in the order of a second
permutation, which is evaluated only where it is needed. Memory is O(S).

    places   0       1       2    3       4          F = 4 full blocks, Q = 1 rest, which has place 2
             [block] [block] [r]  [block] [block]
    position 0       B       2B   2B+r    3B+r

With a `Balance`, the D = T * G draws of the epoch are cut into lanes instead of the N samples. Several draws may be of
the same sample. A draw has the number sample + k * N: number % N is the sample in the shards, and the random choices
that the number keys (crops, flips) differ between the draws of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from wasteddp.errors import SettingsError
from wasteddp.order.balance import Balance
from wasteddp.order.keyed_random import BLOCKS, I64, WINDOW, permute

PADDING = -1
_START, _PLACES_OF_RESTS = 1, 2  # last parts of a key, see `TrainPlan.samples_at` and `block_order`


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """The order of training samples.

    Args:
        num_samples: N.
        global_batch: G.
        seed: the order depends on the seed and the epoch only.
        lanes: P, a divisor of G. P = G allows every number of ranks that divides G.
        block: B neighbouring samples of a shard are read one after another. 1: a uniform permutation; the size of a
            shard or more: whole shards are read.
        window: W samples of a lane are shuffled with each other, so that the samples of a block are spread over more
            steps; 0 or 1: no window. Needed only if `block` is larger than 1.
        shard_samples: samples in each shard, N in total. Needed only if `block` is larger than 1, since no block spans
            two shards. Empty: one shard.
        balance: how often each class is drawn, with T * G draws in an epoch. None: each sample once. Only if `block`
            is 1.
    """

    num_samples: int
    global_batch: int
    seed: int
    lanes: int
    block: int = 1
    window: int = 0
    shard_samples: tuple[int, ...] = field(default=(), repr=False)
    balance: Balance | None = field(default=None, repr=False)
    _cuts: Cuts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch:
            raise SettingsError(
                f"the training split has {self.num_samples} samples and train.batch_size is {self.global_batch}",
                "an epoch would have no steps",
                f"set train.batch_size to {self.num_samples} or less",
            )
        if self.lanes < 1 or self.global_batch % self.lanes:
            raise SettingsError(
                f"data.lanes is {self.lanes} and train.batch_size is {self.global_batch}",
                "a step could not take the same number of samples from every lane",
                "set data.lanes to a divisor of train.batch_size, or to 0",
            )
        shard_samples = self.shard_samples or (self.num_samples,)
        if sum(shard_samples) != self.num_samples:
            raise ValueError(f"the shards have {sum(shard_samples)} samples, the plan has {self.num_samples}")
        fits = self.steps_per_epoch * self.global_batch
        if self.balance and (self.block > 1 or self.balance.num_draws != fits):
            raise ValueError(f"{self.balance.num_draws} draws, blocks of {self.block}, and {fits} samples an epoch")
        object.__setattr__(self, "_cuts", Cuts.from_sizes(shard_samples, self.block))

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    @property
    def num_shards(self) -> int:
        return len(self._cuts.shard_begins) - 1

    @property
    def lane_length(self) -> int:
        return self.steps_per_epoch * self.global_batch // self.lanes

    @property
    def num_draws(self) -> int:
        """Positions in the order of an epoch: N, or D with a balance."""
        return self.balance.num_draws if self.balance else self.num_samples

    @property
    def left_out_per_epoch(self) -> int:
        """Samples that an epoch does not use because they do not fill a global batch; 0 with a balance."""
        return self.num_draws - self.steps_per_epoch * self.global_batch

    def step_samples(self, epoch: int, step_in_epoch: int, *, rank: int = 0, world_size: int = 1) -> I64:
        """Return the sample numbers of one rank's part of a step: int64 [G / R], lane by lane."""
        steps = range(step_in_epoch, step_in_epoch + 1)
        samples: I64 = self.steps_samples(epoch, steps, rank=rank, world_size=world_size)[0]
        return samples

    def steps_samples(self, epoch: int, steps: range, *, rank: int = 0, world_size: int = 1) -> I64:
        """Return the sample numbers of one rank's part of consecutive steps: int64 [steps, G / R].

        One call for several steps is faster than one call for each.

        Raises:
            SettingsError: the number of ranks does not divide the number of lanes.
        """
        if self.lanes % world_size:
            raise SettingsError(
                f"{world_size} processes and {self.lanes} lanes",
                "the processes could not get equal numbers of lanes",
                f"start a number of processes that divides {self.lanes}",
            )
        lanes_per_rank = self.lanes // world_size
        lane = np.arange(rank * lanes_per_rank, (rank + 1) * lanes_per_rank, dtype=np.int64)
        per_lane = self.global_batch // self.lanes
        in_lane = np.arange(steps.start * per_lane, steps.stop * per_lane, dtype=np.int64).reshape(-1, 1, per_lane)
        # [steps, lanes of the rank, samples a lane] -> [steps, G / R]
        lane_3d, in_lane_3d = np.broadcast_arrays(lane[:, None], in_lane)
        samples = self._sample(epoch, lane_3d.reshape(-1), in_lane_3d.reshape(-1))
        return samples.reshape(len(steps), -1)

    def left_out_samples(self, epoch: int) -> I64:
        """Return the samples that an epoch does not use: int64 [left_out_per_epoch]."""
        first = self.steps_per_epoch * self.global_batch
        return self.samples_at(epoch, np.arange(first, self.num_draws, dtype=np.int64))

    def samples_at(self, epoch: int, position: I64) -> I64:
        """Return the samples at some positions (0 .. N-1) of an epoch's order.

        Lane p has the positions p * L .. (p + 1) * L - 1.
        """
        if self.block == 1:
            draw = permute(position, self.num_draws, BLOCKS, self.seed, epoch)
            return self.balance.samples(epoch, draw) if self.balance else draw
        # The order of the blocks is a ring, and each epoch starts at another point of it. The samples left out are the
        # last ones. With a fixed start they would always be at the end of a block, never at its beginning.
        start = permute(np.zeros((), np.int64), self.num_samples, BLOCKS, self.seed, epoch, _START)
        return block_order(self._cuts, self.seed, epoch).samples((position + start) % self.num_samples)

    def rank_samples(self, epoch: int, *, rank: int, world_size: int) -> I64:
        """Return all samples of a rank in an epoch, lane by lane: int64 [L * P / R]."""
        lanes_per_rank = self.lanes // world_size
        position = np.arange(lanes_per_rank * self.lane_length, dtype=np.int64)
        lane, in_lane = rank * lanes_per_rank + position // self.lane_length, position % self.lane_length
        return self._sample(epoch, lane, in_lane)

    def shard_of(self, samples: I64) -> I64:
        """Return the number of the shard that holds each sample."""
        return np.searchsorted(self._cuts.shard_begins, samples % self.num_samples, side="right") - 1

    def block_begins(self, epoch: int) -> I64:
        """Return the positions at which a block begins and 0, ascending. Its size grows with N / B."""
        start = permute(np.zeros((), np.int64), self.num_samples, BLOCKS, self.seed, epoch, _START)
        begins = (block_order(self._cuts, self.seed, epoch).begins() - start) % self.num_samples
        return np.union1d(begins, [0])

    def _sample(self, epoch: int, lane: I64, in_lane: I64) -> I64:
        if self.window > 1:
            window = in_lane // self.window
            size = np.minimum(self.window, self.lane_length - window * self.window)
            shuffled = permute(in_lane % self.window, size, WINDOW, self.seed, epoch, lane, window)
            in_lane = window * self.window + shuffled
        return self.samples_at(epoch, lane * self.lane_length + in_lane)


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Every sample once, in the order of the shards, padded so that all ranks have the same number of full batches.

    Args:
        num_samples: N.
        batch: samples in a batch of one rank.
    """

    num_samples: int
    batch: int

    def num_batches(self, world_size: int = 1) -> int:
        """Return the number of batches of each rank."""
        return -(-self.num_samples // (self.batch * world_size))

    def batch_samples(self, number: int, *, rank: int = 0, world_size: int = 1) -> I64:
        """Return the sample numbers of one rank's batch: int64 [batch], `PADDING` after the end of the split."""
        first = (number * world_size + rank) * self.batch
        samples = np.arange(first, first + self.batch, dtype=np.int64)
        return np.where(samples < self.num_samples, samples, PADDING)


def micro_batch(*, global_batch: int, world_size: int, max_micro_batch: int) -> tuple[int, int]:
    """Solve G = ranks x micro-batch x accumulation for the largest micro-batch allowed.

    Returns:
        (micro-batch, accumulation)

    Raises:
        SettingsError: the number of ranks does not divide G; the message names the numbers that do.
    """
    if global_batch % world_size:
        divisors = [r for r in range(1, min(global_batch, 4 * world_size) + 1) if global_batch % r == 0]
        below, above = global_batch // world_size * world_size, -(-global_batch // world_size) * world_size
        raise SettingsError(
            f"train.batch_size is {global_batch} and there are {world_size} processes",
            "the global batch cannot be divided equally, so the gradients of the ranks would have unequal weights",
            f"set train.batch_size to {' or '.join(str(n) for n in (below, above) if n)}, "
            f"or start {', '.join(map(str, divisors))} processes",
        )
    per_rank = global_batch // world_size
    size = next(m for m in range(min(per_rank, max_micro_batch), 0, -1) if per_rank % m == 0)
    return size, per_rank // size


@dataclass(frozen=True, slots=True, eq=False)
class Cuts:
    """Where the shards are cut; the same in every epoch. Compared by identity, so it can be the key of a cache."""

    block: int
    shard_begins: I64  # first sample of each shard, then N: [S + 1]
    blocks_before: I64  # full blocks before each shard, then F: [S + 1]

    @classmethod
    def from_sizes(cls, shard_samples: Sequence[int], block: int) -> Cuts:
        """Cut shards of these sizes into blocks."""
        sizes = np.asarray(shard_samples, dtype=np.int64)
        return cls(block, np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([[0], np.cumsum(sizes // block)]))

    @property
    def num_blocks(self) -> int:
        return int(self.blocks_before[-1])


@dataclass(frozen=True, slots=True, eq=False)
class BlockOrder:
    """The order of one epoch: position 0 .. N-1 -> sample."""

    cuts: Cuts
    key: tuple[int, ...]
    rest_begins: I64  # position at which each rest begins, ascending: [Q]
    rest_samples: I64  # first sample of each rest, in the same order: [Q]
    rests_before: I64  # samples in the rests before each, then in all: [Q + 1]

    def samples(self, position: I64) -> I64:
        """Return the sample at each position."""
        cuts = self.cuts
        started = np.searchsorted(self.rest_begins, position, side="right")  # rests that begin at or before
        in_blocks = position - self.rests_before[started]
        place, within = in_blocks // cuts.block, in_blocks % cuts.block
        if not len(self.rest_begins):
            return self._first_samples(place) + within
        rest = np.maximum(started - 1, 0)
        in_rest = position - self.rest_begins[rest]
        is_rest = (started > 0) & (in_rest < np.diff(self.rests_before)[rest])
        if not cuts.num_blocks:
            return self.rest_samples[rest] + in_rest
        in_block = self._first_samples(np.where(is_rest, 0, place)) + within
        return np.where(is_rest, self.rest_samples[rest] + in_rest, in_block)

    def begins(self) -> I64:
        """Return where each block and each rest begins, ascending: [F + Q]; its size grows with N / B."""
        places = np.arange(self.cuts.num_blocks, dtype=np.int64)
        full_before_rest = (self.rest_begins - self.rests_before[:-1]) // self.cuts.block
        rests = np.searchsorted(full_before_rest, places, side="right")
        return np.sort(np.concatenate([places * self.cuts.block + self.rests_before[rests], self.rest_begins]))

    def _first_samples(self, place: I64) -> I64:
        """Return the first sample of the full block at each place among the full blocks."""
        cuts = self.cuts
        block = permute(place, cuts.num_blocks, *self.key)
        shard = np.searchsorted(cuts.blocks_before, block, side="right") - 1
        return cuts.shard_begins[shard] + (block - cuts.blocks_before[shard]) * cuts.block


@lru_cache(maxsize=4)  # a loader that reads ahead may use two epochs at the same time
def block_order(cuts: Cuts, seed: int, epoch: int) -> BlockOrder:
    """Return the order of an epoch. Creating it costs O(S); looking up samples in it does not."""
    key = (BLOCKS, seed, epoch)
    sizes = np.diff(cuts.shard_begins)
    lengths = sizes % cuts.block
    shard = np.flatnonzero(lengths)
    lengths = lengths[shard]
    first = cuts.shard_begins[shard] + sizes[shard] - lengths
    places = permute(np.arange(len(shard), dtype=np.int64), cuts.num_blocks + len(shard), *key, _PLACES_OF_RESTS)
    ascending = np.argsort(places)
    before = np.concatenate([[0], np.cumsum(lengths[ascending])])
    full_before = places[ascending] - np.arange(len(shard))
    return BlockOrder(cuts, key, full_before * cuts.block + before[:-1], first[ascending], before)
