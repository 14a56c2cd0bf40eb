"""Temperature scaling: the fitted temperature, its error, and what it changes, against plain references."""

from __future__ import annotations

import numpy as np
import pytest

from wasteddp.decisions.calibration import Calibration, calibrate, calibration_error, fit_temperature, scaled
from wasteddp.decisions.intervals import bootstrap_interval
from wasteddp.errors import DecisionError
from wasteddp.inference.metrics import Answers, Reliability


def samples(count: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return labels drawn from softmax(z / temperature), and softmax(z)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (count, 5))
    true = np.exp(logits / temperature)
    true /= true.sum(axis=1, keepdims=True)
    labels = (true.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    given = np.exp(logits - logits.max(axis=1, keepdims=True))
    return labels, (given / given.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_that_of_a_grid_search_and_near_the_true_one(temperature: float) -> None:
    labels, shares = samples(1500, temperature)
    found = fit_temperature(labels, shares)
    grid = np.exp(np.linspace(-1.2, 1.2, 601))
    losses = [-np.log(scaled(shares, t)[np.arange(len(labels)), labels]).mean() for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.0041)
    assert found == pytest.approx(temperature, rel=0.1)


def test_probabilities_at_another_temperature_are_a_softmax_of_scaled_logits() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (7, 4))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.exp(logits / 1.7) / np.exp(logits / 1.7).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scaled(shares, 1.7), expected, rtol=1e-12)
    np.testing.assert_allclose(scaled(np.array([[1.0, 0.0]]), 2.0).sum(), 1.0)


def test_calibration_makes_an_overconfident_model_honest_and_reports_how_much() -> None:
    labels, shares = samples(2000, 3.0)
    found = calibrate(labels, shares, split="val")
    assert found.ece_after[0] < found.ece_before[0] / 3
    assert found.ece_before[1] < found.ece_before[0] < found.ece_before[2]
    assert found.nll_after < found.nll_before
    assert Calibration.from_json(found.to_json()) == found


def test_the_calibration_error_is_that_of_the_reliability_table() -> None:
    labels, shares = samples(500, 2.0)
    table = Reliability.measure(Answers.from_probabilities(labels, shares))
    assert calibration_error(shares.max(axis=1).astype(float), shares.argmax(axis=1) == labels) == pytest.approx(
        table.calibration_error
    )


def test_too_few_images_are_refused_with_the_number_that_would_do() -> None:
    labels, shares = samples(12, 1.5)
    with pytest.raises(DecisionError, match=r"12 images fix the temperature to .* % only") as refused:
        fit_temperature(labels, shares)
    needed = int(refused.value.remedy.split()[1].replace(",", ""))
    assert 13 < needed < 2000
    fit_temperature(*samples(2 * needed, 1.5))
    right = np.eye(3, dtype=np.float32)[[0, 1, 2]]
    with pytest.raises(DecisionError, match="all 3 images are classified correctly"):
        fit_temperature([0, 1, 2], right)
    with pytest.raises(DecisionError, match="no images"):
        fit_temperature([], np.zeros((0, 3)))


def test_a_temperature_outside_its_range_is_refused() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(3), 400)
    with pytest.raises(DecisionError, match="on 400 images, the model's confidence has nothing to do with being right"):
        fit_temperature(shares.argmin(axis=1), shares)
    labels = rng.integers(0, 3, 400)
    shares = np.full((400, 3), 0.33)
    shares[np.arange(400), labels] = 0.34
    labels[0] = (labels[0] + 1) % 3
    with pytest.raises(DecisionError, match=r"best temperature is below 0\.018: the model is right far more often"):
        fit_temperature(labels, shares)


def test_the_interval_of_the_calibration_error_covers_that_of_a_calibrated_model() -> None:
    """Its true error is 0; a percentile interval never covers it, since chance only makes the error larger."""
    found = [calibrate(*samples(300, 1.0, seed), split="val").ece_before for seed in range(15)]
    assert all(low <= value <= high for value, low, high in found)
    assert sum(low < 0.005 for _, low, _ in found) >= 10


def test_the_standard_error_is_that_of_many_draws() -> None:
    found = [np.log(fit_temperature(*samples(400, 1.5, seed))) for seed in range(60)]
    # 400 images fix log(T) to about 8 %; the check passes 15 % and stops well above it
    assert 0.03 < np.std(found) < 0.15


def test_copies_of_an_image_in_its_group_do_not_make_the_temperature_surer() -> None:
    labels, shares = samples(40, 1.5)
    with pytest.raises(DecisionError, match=r"40 images fix the temperature to (\d+) % only") as few:
        fit_temperature(labels, shares)
    groups = np.repeat(np.arange(40), 50)
    many = np.repeat(labels, 50), np.repeat(shares, 50, axis=0)
    fit_temperature(*many)
    with pytest.raises(DecisionError) as grouped:
        fit_temperature(*many, groups)
    assert str(grouped.value).split("to ")[1].split(" %")[0] == str(few.value).split("to ")[1].split(" %")[0]


def test_an_interval_over_groups_is_wider_where_groups_agree() -> None:
    values = np.repeat(np.random.default_rng(0).random(20), 50)  # 20 groups of 50 equal values
    groups = np.repeat(np.arange(20), 50)

    def mean(rows: np.ndarray) -> float:
        return float(values[rows].mean())

    alone, clustered = bootstrap_interval(mean, 1000), bootstrap_interval(mean, 1000, groups=groups)
    assert clustered[1] - clustered[0] > 4 * (alone[1] - alone[0])
    expected = 2 * 1.96 * values[::50].std() / np.sqrt(20)
    assert clustered[1] - clustered[0] == pytest.approx(expected, rel=0.2)
