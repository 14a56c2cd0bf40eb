"""Which images to label first: against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wasteddp.decisions.labelling_order import entropy, labelling_order, margin


def test_margin_and_entropy_equal_a_plain_loop() -> None:
    p = np.random.default_rng(0).dirichlet(np.full(5, 0.3), 50)
    p[0] = [1, 0, 0, 0, 0]
    largest = [sorted(row, reverse=True) for row in p.tolist()]
    assert margin(p) == pytest.approx([row[0] - row[1] for row in largest])
    assert entropy(p) == pytest.approx([-math.fsum(x * math.log(x) for x in row if x) for row in p.tolist()])
    assert margin(np.ones((3, 1))).tolist() == [1, 1, 1]


def test_the_image_in_most_doubt_comes_first() -> None:
    p = np.array([[0.9, 0.1, 0.0], [0.4, 0.4, 0.2], [0.5, 0.5, 0.0], [0.6, 0.3, 0.1]])
    assert labelling_order(p).tolist() == [1, 2, 3, 0]  # of equal margins, the larger entropy


def test_unlikeness_counts_as_much_as_doubt() -> None:
    p = np.array([[0.5, 0.5], [0.6, 0.4], [0.7, 0.3], [0.9, 0.1]])
    # places by doubt 0 1 2 3, by unlikeness 3 2 0 1
    assert labelling_order(p, np.array([0.1, 0.2, 9.0, 5.0])).tolist() == [2, 0, 1, 3]
