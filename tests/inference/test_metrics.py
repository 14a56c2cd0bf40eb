"""Metrics compared with plain loops and published numbers."""

from __future__ import annotations

import json
from math import isnan, nan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wasteddp.decisions.intervals import wilson_interval
from wasteddp.inference.metrics import (
    as_float,
    confusion_matrix,
    percent,
    summarise,
)

matrices = st.integers(1, 6).flatmap(lambda k: arrays(np.int64, (k, k), elements=st.integers(0, 20)))


def slowly(labels: list[int], predictions: list[int], num_classes: int) -> dict[str, list[float]]:
    """Compute precision, recall and F1 of each class by their definitions, sample by sample."""
    figures: dict[str, list[float]] = {"precision": [], "recall": [], "f1": [], "support": []}
    for k in range(num_classes):
        pairs = list(zip(labels, predictions, strict=True))
        hits = sum(1 for true, guess in pairs if true == k and guess == k)
        support = sum(1 for true in labels if true == k)
        predicted = sum(1 for guess in predictions if guess == k)
        precision = hits / predicted if predicted else nan
        recall = hits / support if support else nan
        if not support and not predicted:
            f1 = nan
        elif hits == 0:
            f1 = 0.0
        else:
            f1 = 2 * precision * recall / (precision + recall)
        for name, value in (("precision", precision), ("recall", recall), ("f1", f1), ("support", support)):
            figures[name].append(value)
    return figures


@given(matrices)
def test_metrics_are_those_of_plain_loops(matrix: np.ndarray) -> None:
    num_classes = len(matrix)
    cells = [(t, p) for t in range(num_classes) for p in range(num_classes) for _ in range(matrix[t, p])]
    labels, predictions = [t for t, _ in cells], [p for _, p in cells]
    expected = slowly(labels, predictions, num_classes)
    found = summarise(matrix)
    for name, values in expected.items():
        assert [getattr(one, name) for one in found.per_class] == pytest.approx(values, nan_ok=True)
    occurring = [k for k in range(num_classes) if expected["support"][k]]
    if occurring:
        assert found.accuracy == sum(t == p for t, p in cells) / len(cells)
        assert found.macro_f1 == pytest.approx(sum(expected["f1"][k] for k in occurring) / len(occurring))
        assert found.macro_recall == pytest.approx(sum(expected["recall"][k] for k in occurring) / len(occurring))
    assert np.array_equal(confusion_matrix(labels, predictions, num_classes), matrix)


def test_what_is_undefined_is_nan_and_null_and_no_average_takes_it_in() -> None:
    # class 1 occurs and is never predicted, class 2 is predicted and never occurs, class 3 neither
    metrics = summarise([[3, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    glass, metal, paper, trash = metrics.per_class
    assert isnan(metal.precision)
    assert metal.recall == 0
    assert metal.f1 == 0
    assert paper.precision == 0
    assert isnan(paper.recall)
    assert paper.f1 == 0
    assert isnan(trash.precision)
    assert isnan(trash.recall)
    assert isnan(trash.f1)
    assert metrics.macro_recall == (glass.recall + 0) / 2
    assert metrics.macro_f1 == (glass.f1 + 0) / 2
    assert metrics.averaged == "2 of 4 classes"
    assert summarise(np.eye(4)).averaged == "4 classes"
    told = json.loads(json.dumps(metrics.to_json(), allow_nan=False))
    assert told["per_class"][3] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert told["accuracy"] == 0.5


def test_no_samples_at_all_give_no_figures_and_no_warning() -> None:
    metrics = summarise(np.zeros((2, 2), np.int64))
    assert metrics.num_samples == 0
    assert all(isnan(value) for value in (metrics.accuracy, metrics.accuracy_low, metrics.macro_f1))
    json.dumps(metrics.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_that_of_published_tables(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_lies_in_0_to_1_around_the_share_and_solves_wilsons_equation(counts: tuple[int, int]) -> None:
    correct, total = counts
    share = correct / total
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        # a bound is a true fraction from which the observed one is exactly z standard errors away
        assert abs(share - bound) == pytest.approx(1.959964 * sqrt(bound * (1 - bound) / total), abs=1e-6)


@given(st.floats(0, 1, width=32))
def test_a_probability_is_written_so_that_the_same_float32_is_read_back(value: float) -> None:
    assert np.float32(as_float(np.float32(value))) == np.float32(value)


def test_probabilities_are_written_short_and_shares_as_percent() -> None:
    assert repr(as_float(np.float32(0.1))) == "0.1"
    assert (percent(0.93119), percent(1), percent(nan)) == ("93.1 %", "100.0 %", "-")
