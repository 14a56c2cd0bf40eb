"""Random numbers are uniform and independent between keys, and `permute` computes permutations."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wasteddp.order.keyed_random import CROP, FLIP, bits, permute, uniform


@given(size=st.integers(1, 3000), key=st.integers(0, 2**40))
def test_permute_sends_each_position_to_another_place(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_of_a_huge_range_costs_no_memory_and_stays_inside() -> None:
    size = 10**12
    places = permute(np.arange(1000) * (size // 1000), size, 1)
    assert len(np.unique(places)) == 1000
    assert places.min() >= 0
    assert places.max() < size


def test_every_permutation_of_four_is_equally_frequent() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for key in range(4800):
        order = tuple(permute(np.arange(4), 4, key).tolist())
        counts[order] = counts.get(order, 0) + 1
    # 24 orders, each expected 200 times; chi-square with 23 degrees of freedom exceeds 49.7 once in 1,000 times
    assert len(counts) == 24
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 49.7


def test_sizes_and_keys_may_differ_from_position_to_position() -> None:
    together = permute(np.array([0, 1, 2, 0, 1]), np.array([3, 3, 3, 2, 2]), 5, np.array([0, 0, 0, 1, 1]))
    apart = [permute(np.arange(3), 3, 5, 0), permute(np.arange(2), 2, 5, 1)]
    assert np.array_equal(together, np.concatenate(apart))


def test_uniform_is_uniform_in_each_draw_and_uncorrelated() -> None:
    draws = uniform(CROP, 3, 7, np.arange(50_000), num=4)
    assert draws.shape == (50_000, 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        # 20 bins, 2,500 expected; chi-square with 19 degrees of freedom exceeds 43.8 once in 1,000 times
        assert ((np.histogram(column, 20, (0, 1))[0] - 2500) ** 2 / 2500).sum() < 43.8
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.02


def test_a_draw_depends_on_each_part_of_its_key_and_on_nothing_else() -> None:
    base = bits(CROP, 1, 2, 3)
    assert base == bits(CROP, 1, 2, np.array([3]))[0]
    assert len({int(bits(*key)) for key in [(CROP, 1, 2, 3), (FLIP, 1, 2, 3), (CROP, 2, 1, 3), (CROP, 1, 3, 2)]}) == 4
