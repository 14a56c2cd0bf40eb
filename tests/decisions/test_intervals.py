"""Intervals over groups are those of a plain loop, and cover the true share; the text says when they are too narrow."""

from __future__ import annotations

import numpy as np
import pytest

from wasteddp.decisions.intervals import (
    SampleGroups,
    bootstrap_interval,
    bootstrap_intervals,
    class_intervals,
    describe_groups,
    share_interval,
    wilson_interval,
)


def drawn(seed: int, num_groups: int = 30, each: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, predictions and groups; each group has an accuracy of its own."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_groups), each)
    skill = rng.beta(4, 1, num_groups)[groups]
    labels = rng.integers(0, 3, len(groups))
    predicted = np.where(rng.random(len(groups)) < skill, labels, (labels + 1) % 3)
    order = rng.permutation(len(groups))
    return labels[order], predicted[order], groups[order].astype(np.int32)


def test_they_are_those_of_a_plain_loop() -> None:
    labels, predicted, groups = drawn(0, num_groups=12, each=8)
    rng = np.random.default_rng(0)
    accuracy, recall, precision = [], [[], [], []], [[], [], []]
    for _ in range(1000):
        right = total = 0
        hits, true, found = [0] * 3, [0] * 3, [0] * 3
        for group in rng.integers(0, 12, 12):
            for sample in range(len(labels)):
                if groups[sample] == group:
                    t, p = int(labels[sample]), int(predicted[sample])
                    right, total = right + (t == p), total + 1
                    true[t] += 1
                    found[p] += 1
                    hits[t] += t == p
        accuracy.append(right / total)
        for k in range(3):
            recall[k].append(hits[k] / true[k])
            precision[k].append(hits[k] / found[k])
    result = class_intervals(labels, predicted, groups, num_classes=3)
    assert result.accuracy == pytest.approx(np.quantile(accuracy, [0.025, 0.975]))
    assert share_interval(labels == predicted, groups) == pytest.approx(result.accuracy)
    for k in range(3):
        assert result.recall[k] == pytest.approx(np.quantile(recall[k], [0.025, 0.975]))
        assert result.precision[k] == pytest.approx(np.quantile(precision[k], [0.025, 0.975]))
    low, high = result.accuracy
    narrow = wilson_interval(int((labels == predicted).sum()), len(labels))
    assert high - low > narrow[1] - narrow[0], "images of a group resemble each other"


def test_they_cover_the_true_share_more_often_than_intervals_over_images() -> None:
    truth = 4 / 5  # the mean of Beta(4, 1)
    over_groups = over_images = 0
    for seed in range(200):
        labels, predicted, groups = drawn(seed + 1)
        right = labels == predicted
        low, high = bootstrap_interval(lambda rows: float(right[rows].mean()), len(right), groups=groups, draws=300)  # noqa: B023
        over_groups += low <= truth <= high
        low, high = wilson_interval(int(right.sum()), len(right))
        over_images += low <= truth <= high
    assert over_groups >= 0.88 * 200, "measured: 93 %"
    assert over_images <= 0.8 * 200, "measured: 76.5 %"


def test_a_class_without_images_has_no_interval() -> None:
    labels, predicted, groups = drawn(3)
    found = class_intervals(labels, predicted, groups, num_classes=4)
    assert np.isnan(found.recall[3]).all()
    assert found.to_json()["recall"][3] is None
    assert found.to_json()["precision"][3] is None
    assert np.isnan(share_interval([], [])).all()


def test_a_share_that_no_draw_changes_has_the_interval_of_its_number_of_groups() -> None:
    groups = np.repeat([0, 1, 2], 50)
    assert share_interval(np.ones(150), groups) == pytest.approx(wilson_interval(3, 3))
    labels = np.r_[np.zeros(100, int), np.ones(50, int)]
    predicted = np.r_[np.zeros(100, int), np.ones(40, int), np.zeros(10, int)]
    found = class_intervals(labels, predicted, groups, num_classes=2)
    assert found.recall[0] == pytest.approx(wilson_interval(2, 2))
    assert np.isnan(found.recall[1]).all(), "all its images are of one group"


def test_a_statistic_that_is_not_defined_in_some_draws_uses_the_others() -> None:
    values = np.array([1.0, np.nan])
    low, high = bootstrap_intervals(lambda rows: np.array([values[rows].max(), np.nan]), 2)
    assert (low[0], high[0]) == (1.0, 1.0)
    assert np.isnan([low[1], high[1]]).all()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (range(25), "the intervals are over 25 groups (column site), by cluster bootstrap"),
        (range(3), "over 3 groups (column site), by cluster bootstrap; fewer than 20 groups make them too narrow"),
        ([7, 7], "all images are of one group (column site), so the intervals are over images, and too narrow"),
    ],
)
def test_few_groups_are_reported(numbers: list[int], said: str) -> None:
    groups = SampleGroups("column site", np.array(list(numbers), np.int32))
    line = describe_groups(groups.to_json())
    assert line.endswith(said)
    assert (groups.to_resample is None) == (len(set(numbers)) < 2)
    assert describe_groups(None) == ""
