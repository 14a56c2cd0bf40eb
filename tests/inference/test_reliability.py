"""Mistakes and reliability are merged over processes, and equal the results of a plain loop."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wasteddp.inference.metrics import CONFIDENCE_BINS, MISTAKES_LISTED, Answers, Mistakes, Reliability


def answers_of(num: int, seed: int, classes: int = 3) -> Answers:
    draw = np.random.default_rng(seed)
    probabilities = draw.dirichlet(np.ones(classes), num).astype(np.float32)
    probabilities[: num // 3] = np.round(probabilities[: num // 3], 1)  # ties, and confidences on the bins' edges
    return Answers.from_probabilities(draw.integers(0, classes, num), probabilities)


def part_of(answers: Answers, rows: slice) -> Answers:
    return Answers(*(getattr(answers, name)[rows] for name in Answers.__slots__))


@given(st.integers(0, 90), st.integers(0, 5), st.integers(1, 4))
def test_parts_of_a_split_add_up_to_the_whole(num: int, seed: int, ranks: int) -> None:
    whole = answers_of(num, seed)
    parts = [part_of(whole, slice(rank, None, ranks)) for rank in range(ranks)]
    assert Mistakes.merge(map(Mistakes.find, parts)) == Mistakes.find(whole)
    merged, direct = Reliability.merge(map(Reliability.measure, parts)), Reliability.measure(whole)
    assert (merged.counts, merged.correct) == (direct.counts, direct.correct)
    assert merged.confidence_sums == pytest.approx(direct.confidence_sums)


@given(st.integers(1, 60), st.integers(0, 5))
def test_reliability_is_that_of_a_plain_loop(num: int, seed: int) -> None:
    answers = answers_of(num, seed)
    found = Reliability.measure(answers)
    gap = 0.0
    for number in range(CONFIDENCE_BINS):
        inside = [
            i
            for i in range(num)
            if min(int(float(answers.confidence[i]) * CONFIDENCE_BINS), CONFIDENCE_BINS - 1) == number
        ]
        right = sum(int(answers.predicted[i] == answers.labels[i]) for i in inside)
        assert (found.counts[number], found.correct[number]) == (len(inside), right)
        gap += abs(right - sum(float(answers.confidence[i]) for i in inside))
    assert found.calibration_error == pytest.approx(gap / num)
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert sum(one["count"] for one in record["bins"]) == num


def test_the_surest_mistakes_and_the_worst_ones_are_two_orders() -> None:
    probabilities = np.array(
        [[0.9, 0.1, 0], [0.2, 0.5, 0.3], [0.05, 0.45, 0.5], [0.3, 0.7, 0], [0.1, 0.8, 0.1], [1, 0, 0]], np.float32
    )
    mistakes = Mistakes.find(Answers.from_probabilities([0, 0, 0, 1, 0, 1], probabilities))  # wrong: samples 1, 2, 4, 5
    assert [one.sample for one in mistakes.surest] == [5, 4, 1, 2]
    assert [one.sample for one in mistakes.worst] == [5, 2, 4, 1]
    first = mistakes.surest[0]
    assert (first.true, first.predicted, first.confidence, first.of_truth) == (1, 0, 1.0, 0.0)


def test_no_more_mistakes_are_kept_than_are_listed_and_no_samples_give_none() -> None:
    assert len(Mistakes.find(answers_of(500, 0)).surest) == MISTAKES_LISTED
    nothing = answers_of(0, 0)
    assert Mistakes.find(nothing).surest == ()
    assert Reliability.measure(nothing).to_json()["expected_calibration_error"] is None
