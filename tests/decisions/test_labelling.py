"""Which labels are probably wrong, and in which order to label new images."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wasteddp.decisions.labelling import entropy, find_label_errors, labelling_order, margin


def plain(labels: list[int], p: list[list[float]]) -> tuple[list[tuple[float, int, int]], list[list[int]], float]:
    """The paper's definitions, one image at a time: candidates (margin, image, class), the confident joint, N wrong."""
    num_classes = len(p[0])
    thresholds = []
    for k in range(num_classes):
        own = [p[i][k] for i in range(len(p)) if labels[i] == k]
        thresholds.append(math.fsum(own) / len(own) if own else math.inf)
    joint = [[0] * num_classes for _ in range(num_classes)]
    candidates = []
    for i, label in enumerate(labels):
        best = None
        for k in range(num_classes):
            if p[i][k] >= thresholds[k] - 1e-9 and (best is None or p[i][k] > p[i][best]):
                best = k
        if best is None:
            continue
        joint[label][best] += 1
        if best != label:
            candidates.append((p[i][label] - max(p[i][k] for k in range(num_classes) if k != label), i, best))
    expected = 0.0
    for k in range(num_classes):
        if total := sum(joint[k]):
            expected += labels.count(k) * (total - joint[k][k]) / total
    return sorted(candidates), joint, expected


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 6), st.integers(1, 80), st.integers(0, 2**32 - 1), st.sampled_from([0.05, 1.0, 30.0]), st.booleans()
)
def test_equals_a_plain_loop(num_classes: int, num_images: int, seed: int, spread: float, coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(num_classes, spread), num_images)
    p = np.round(p, 1) if coarse else p  # with ties
    labels = rng.integers(0, rng.integers(1, num_classes + 1), num_images)  # some classes may have no image
    found = find_label_errors(labels, p)
    candidates, joint, expected = plain(labels.tolist(), p.tolist())
    assert [(image, k) for _, image, k in candidates] == list(
        zip(found.images.tolist(), found.classes.tolist(), strict=True)
    )
    assert found.margins == pytest.approx([margin for margin, _, _ in candidates])
    assert found.joint_KK.tolist() == joint
    assert found.num_expected == pytest.approx(expected)


def test_a_class_that_the_model_doubts_has_a_lower_threshold() -> None:
    # Of class 1, the model is never sure: 0.4 is confident for it, though class 0 is more probable.
    labels = [0, 0, 0, 1, 1]
    p = [[0.95, 0.05], [0.9, 0.1], [0.58, 0.42], [0.6, 0.4], [0.62, 0.38]]
    found = find_label_errors(labels, p)
    assert (found.images.tolist(), found.classes.tolist()) == ([2], [1])
    assert found.margins == pytest.approx([0.58 - 0.42])


def test_equal_probabilities_reach_their_own_mean() -> None:
    labels, p = np.zeros(7, int), np.full((7, 2), [0.1, 0.9])
    assert find_label_errors(labels, p).joint_KK.tolist() == [[7, 0], [0, 0]]


def test_planted_errors_come_first_and_their_number_is_estimated() -> None:
    """A model that is right on 90 % of the images, and 5 % wrong labels: most are found, few others are named."""
    rng = np.random.default_rng(3)
    num_images, num_classes = 4000, 6
    true = rng.integers(0, num_classes, num_images)
    logits = rng.normal(0, 1, (num_images, num_classes))
    logits[np.arange(num_images), true] += 3
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert (p.argmax(axis=1) == true).mean() == pytest.approx(0.9, abs=0.05)
    labels = true.copy()
    planted = rng.choice(num_images, 200, replace=False)
    labels[planted] = (labels[planted] + rng.integers(1, num_classes, 200)) % num_classes
    found = find_label_errors(labels, p)
    hits = np.isin(found.images, planted)
    assert hits.sum() / 200 > 0.6  # by chance: 0.05
    assert hits.mean() > 0.6
    assert hits[:50].mean() > hits.mean()  # the surest come first
    assert found.num_expected == pytest.approx(200, rel=0.35)


@pytest.mark.parametrize(
    ("labels", "p"),
    [([0], [[0.5, 0.5], [1, 0]]), ([2], [[0.5, 0.5]]), ([-1], [[0.5, 0.5]]), ([0], [[math.nan, 0.5]])],
)
def test_refuses_what_is_not_labels_and_probabilities(labels: list[int], p: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        find_label_errors(labels, p)


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
