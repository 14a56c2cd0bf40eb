"""The order of block mode: blocks of neighbouring samples, read one after another in a keyed order. Pure arithmetic.

Legend: N samples, S shards, B samples in a block, F full blocks, Q rests.

Each shard is cut into full blocks of B samples and, if B does not divide its size, a shorter rest. No block spans two
shards, so a block needs only one shard. Blocks and rests are shuffled together. A keyed permutation gives the rests, at
most one a shard, their places among the F + Q; a sorted table keeps them. The full blocks fill the other places in the
order of a second permutation, which is evaluated only where it is needed. Memory is O(S) and does not grow with N.

    places   0       1       2    3       4          F = 4 full blocks, Q = 1 rest, which has place 2
             [block] [block] [r]  [block] [block]
    position 0       B       2B   2B+r    3B+r
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from wasteddp.order.keyed_random import BLOCKS, I64, permute

_PLACES_OF_RESTS = 2  # last part of a key; the order's starting point uses another one (see `plan`)


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
