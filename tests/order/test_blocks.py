"""The order of block mode: whole blocks, inside their shards, in every order equally often."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wasteddp.order.plan import BlockOrder, Cuts, block_order


def order_of(shard_samples: list[int], block: int, epoch: int = 0) -> BlockOrder:
    return block_order(Cuts.from_sizes(shard_samples, block), 0, epoch)


def walked(order: BlockOrder, num_samples: int) -> list[list[int]]:
    """Return the samples of an epoch, cut at the positions where blocks begin."""
    samples = order.samples(np.arange(num_samples))
    return [part.tolist() for part in np.split(samples, order.begins()[1:])] if num_samples else []


@settings(deadline=None)
@given(shard_samples=st.lists(st.integers(0, 40), max_size=12), block=st.integers(1, 50), epoch=st.integers(0, 9))
def test_blocks_are_the_shards_cut_and_each_comes_once(shard_samples: list[int], block: int, epoch: int) -> None:
    expected, first = [], 0
    for size in shard_samples:
        samples = list(range(first, first + size))
        expected += [samples[at : at + block] for at in range(0, size, block)]
        first += size
    assert sorted(walked(order_of(shard_samples, block, epoch), first)) == expected


def test_every_order_of_blocks_and_rests_is_equally_frequent() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        firsts = tuple(part[0] for part in walked(order_of([3, 5], 3, epoch), 8))
        counts[firsts] = counts.get(firsts, 0) + 1
    # two blocks and a rest: 6 orders, 200 expected of each; chi-square with 5 degrees of freedom exceeds 20.5 once in
    # 1,000 times
    assert len(counts) == 6
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 20.5


@pytest.mark.parametrize("shard_samples", [[4, 4, 4], [0, 3, 0, 5], [1] * 7, [2, 9, 1]])
def test_a_block_of_a_shards_size_or_more_is_the_shard(shard_samples: list[int]) -> None:
    parts = walked(order_of(shard_samples, 9), sum(shard_samples))
    assert sorted(len(part) for part in parts) == sorted(size for size in shard_samples if size)
