"""Thresholds keep what they promise, in simulation, and the bounds are those of a plain loop."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from wasteddp.decisions import thresholds
from wasteddp.decisions.intervals import tail, upper_bound
from wasteddp.decisions.thresholds import choose_error_threshold, choose_recall_threshold, risk_coverage
from wasteddp.errors import DecisionError


@pytest.mark.parametrize(
    ("k", "n", "share"), [(0, 5, 0.3), (2, 5, 0.3), (17, 200, 0.1), (499, 500, 0.999), (5, 5, 0.2)]
)
def test_the_tail_is_that_of_a_loop(k: int, n: int, share: float) -> None:
    assert tail(k, n, share) == pytest.approx(sum(comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k + 1)))


def test_the_bounds_are_those_of_tables() -> None:
    # Clopper and Pearson: 0 of 10 at 95 % one-sided is 1 - 0.05**(1/10); 2 of 20 from published tables
    assert upper_bound(0, 10, 0.05) == pytest.approx(1 - 0.05**0.1)
    assert upper_bound(2, 20, 0.025) == pytest.approx(0.31698, abs=1e-5)
    assert 1 - upper_bound(18, 20, 0.025) == pytest.approx(0.01235, abs=1e-5)  # the lower bound of 2 of 20
    assert upper_bound(10, 10, 0.05) == 1.0
    assert upper_bound(0, 0, 0.05) == 1.0


def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return confidences and whether each is right: right with the probability 0.7 + 0.3 * confidence."""
    confidence = rng.random(count)
    return confidence, rng.random(count) < 0.7 + 0.3 * confidence


def true_error(threshold: float) -> float:
    """Return the error of what `draw` gives from a threshold on: the mean of 0.3 (1 - c) over c in threshold..1."""
    return 0.15 * (1 - threshold)


def test_the_error_is_above_the_promise_no_more_often_than_promised() -> None:
    rng = np.random.default_rng(0)
    chosen = [choose_error_threshold(*draw(rng, 1500), max_error=0.1, level=0.9) for _ in range(1000)]
    broken = sum(true_error(one.threshold) > 0.1 for one in chosen)
    assert broken <= 100 + 3 * np.sqrt(1000 * 0.1 * 0.9)
    assert np.mean([one.num_decided / one.num_samples for one in chosen]) > 0.4  # of the 0.67 that it could be at most
    assert all(one.bound <= 0.1 + 1e-9 and one.num_wrong <= 0.1 * one.num_decided for one in chosen)


def test_the_check_of_the_error_can_fail() -> None:
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(300):  # the largest coverage whose error on the samples themselves is low enough: no guarantee
        confidence, right = draw(rng, 1500)
        order = np.argsort(-confidence)
        risk = np.cumsum(~right[order]) / np.arange(1, 1501)
        broken += true_error(confidence[order][np.flatnonzero(risk <= 0.1)[-1]]) > 0.1
    assert broken > 100


def test_a_guarantee_that_cannot_be_had_is_refused_with_the_images_that_are_missing() -> None:
    rng = np.random.default_rng(1)
    confidence, right = rng.random(60), np.ones(60, bool)
    with pytest.raises(DecisionError, match=r"no threshold on 60 images keeps the error at 0\.02") as refused:
        choose_error_threshold(confidence, right, max_error=0.02)
    missing = int(refused.value.remedy.split()[1].replace(",", ""))
    more = 60 + missing
    assert choose_error_threshold(rng.random(more), np.ones(more, bool), max_error=0.02).num_wrong == 0
    with pytest.raises(DecisionError, match="train a better model"):
        choose_error_threshold(rng.random(500), rng.random(500) < 0.5, max_error=0.02)
    with pytest.raises(DecisionError):
        choose_error_threshold([], [], max_error=0.02)


def test_samples_that_tie_are_decided_together_and_those_of_minus_infinity_never() -> None:
    confidence = np.r_[np.full(400, 0.9), np.full(400, 0.5), np.full(50, -np.inf)]
    right = np.r_[np.ones(400, bool), np.zeros(400, bool), np.ones(50, bool)]
    found = choose_error_threshold(confidence, right, max_error=0.05)
    assert (found.threshold, found.num_decided, found.num_wrong) == (0.9, 400, 0)
    everything = choose_error_threshold(confidence, np.ones(850, bool), max_error=0.05)
    assert (everything.threshold, everything.num_decided) == (0.5, 800)


def test_the_recall_of_a_hazard_is_below_its_floor_no_more_often_than_promised() -> None:
    rng = np.random.default_rng(2)
    chosen = [choose_recall_threshold(rng.random(200), recall=0.95, level=0.9) for _ in range(1000)]
    broken = sum(1 - one.threshold < 0.95 for one in chosen)  # uniform: the recall of a threshold t is 1 - t
    assert broken <= 100 + 3 * np.sqrt(1000 * 0.1 * 0.9)
    assert broken > 20, "the threshold is lower than it must be"
    assert {one.num_missed for one in chosen} == {5}
    assert tail(5, 200, 0.05) <= 0.1 < tail(6, 200, 0.05)


def test_a_hazard_with_too_few_images_is_refused_with_their_number() -> None:
    with pytest.raises(DecisionError, match=r"battery has 100 images .* needs at least 299") as refused:
        choose_recall_threshold(np.linspace(0, 1, 100), recall=0.99, level=0.95, name="battery")
    assert "add 199 images" in refused.value.remedy
    assert choose_recall_threshold(np.linspace(0.1, 1, 299), recall=0.99, level=0.95).threshold == 0.1


def test_the_risk_coverage_curve_is_that_of_a_loop() -> None:
    confidence, right = draw(np.random.default_rng(3), 200)
    coverage, risk, area = risk_coverage(confidence, right)
    order = sorted(range(200), key=lambda i: -confidence[i])
    for at in (0, 17, 199):
        assert coverage[at] == (at + 1) / 200
        assert risk[at] == pytest.approx(sum(not right[i] for i in order[: at + 1]) / (at + 1))
    assert area == pytest.approx(np.mean([sum(not right[i] for i in order[:n]) / n for n in range(1, 201)]))


def test_the_risk_coverage_curve_does_not_depend_on_the_order_of_ties() -> None:
    confidence, right = np.ones(10), np.arange(10) < 8
    _, risk, area = risk_coverage(confidence, right)
    assert risk == pytest.approx(np.full(10, 0.2))
    assert area == pytest.approx(risk_coverage(confidence, right[::-1])[2]) == pytest.approx(0.2)
    assert risk_coverage([], [])[0].shape == (0,)


def test_selection_on_the_split_of_the_thresholds_can_break_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/decisions.md says so: of checkpoints that are all above the limit, the best one on val passes too often."""
    refused = DecisionError("no threshold", "", "")  # counting the missing images takes 0.1 s
    monkeypatch.setattr(thresholds, "_no_guarantee", lambda *_: refused)
    rng = np.random.default_rng(0)
    broken = {1: 0, 40: 0}
    for _ in range(100):
        confidence, common = rng.random(600), rng.normal(size=600)
        for checkpoints in broken:
            noise = rng.normal(size=(checkpoints, 600))
            wrong = np.sqrt(0.8) * common + np.sqrt(0.2) * noise > 1.2816  # the true error is 0.1 at each confidence
            best = wrong[wrong.sum(axis=1).argmin()]
            try:
                choose_error_threshold(confidence, ~best, max_error=0.0999, level=0.9)
            except DecisionError:
                continue
            broken[checkpoints] += 1
    assert broken[1] <= 10 + 3 * np.sqrt(100 * 0.1 * 0.9)
    assert broken[40] > broken[1] + 10
