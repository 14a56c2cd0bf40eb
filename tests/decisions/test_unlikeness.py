"""Distances, percentiles and verdicts against plain loops, and what images of the same origin get."""

from __future__ import annotations

import numpy as np
import pytest

from wasteddp.decisions.unlikeness import _MOST_DIRECTIONS, _SHRINKAGE, UNLIKE_FROM, TrainingFeatures


def draws(seed: int, num: int, num_features: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Return features of three classes, correlated, and their labels."""
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(num_features, num_features))
    labels = np.arange(num) % 3
    return random.normal(size=(num, num_features)) @ mix + 4 * np.eye(3, num_features)[labels], labels


def test_distances_are_those_of_a_loop_with_the_inverse_of_the_covariance() -> None:
    features, labels = draws(0, 90)
    others, _ = draws(1, 7)
    found = TrainingFeatures.fit(features, labels, others).distances(others)
    means = [features[labels == k].mean(axis=0) for k in range(3)]
    covariance = sum(np.outer(x - means[k], x - means[k]) for x, k in zip(features, labels, strict=True)) / 90
    shrunk = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * np.trace(covariance) / 6 * np.eye(6)
    expected = [min((x - mean) @ np.linalg.inv(shrunk) @ (x - mean) for mean in means) for x in others]
    assert found == pytest.approx(expected, rel=1e-4)  # the summary is stored in float32


def test_what_the_kept_directions_leave_has_one_variance() -> None:
    num_features = _MOST_DIRECTIONS + 40
    features = np.random.default_rng(2).normal(size=(600, num_features)) * np.linspace(0.1, 2, num_features)
    labels = np.zeros(600, int)
    summary = TrainingFeatures.fit(features, labels, features[:2])
    mean = features.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(features.T, bias=True))
    values[:40] = values[:40].mean()  # the 40 smallest
    values = (1 - _SHRINKAGE) * values + _SHRINKAGE * values.mean()
    expected = [(x - mean) @ vectors @ np.diag(1 / values) @ vectors.T @ (x - mean) for x in features[:5]]
    assert summary.directions_RD.shape == (_MOST_DIRECTIONS, num_features)
    assert summary.distances(features[:5]) == pytest.approx(expected, rel=1e-4)


def test_percentiles_count_the_reference_below() -> None:
    features, labels = draws(3, 60)
    reference, others = draws(4, 31)[0], draws(5, 40)[0]
    summary = TrainingFeatures.fit(features, labels, reference)
    inside = summary.distances(reference)
    expected = [100 * sum(one < distance for one in inside) / 31 for distance in summary.distances(others)]
    assert summary.percentiles(summary.distances(others)) == pytest.approx(expected)
    assert summary.percentiles(np.array([-1.0, np.inf])).tolist() == [0, 100]


def test_images_of_the_same_origin_are_called_unlike_as_often_as_promised_and_others_are_found() -> None:
    shares, means = [], []
    for seed in range(200):
        features, labels = draws(10 * seed, 120)
        summary = TrainingFeatures.fit(features, labels, draws(10 * seed + 1, 200)[0])
        same = summary.percentiles(summary.distances(draws(10 * seed + 2, 60)[0]))
        shares.append((same >= UNLIKE_FROM).mean())
        means.append(same.mean())
        assert "expect accuracy" not in summary.verdict_of(same)
        far = summary.percentiles(summary.distances(draws(10 * seed + 3, 60)[0] * 3))
        assert "expect accuracy far below" in summary.verdict_of(far)
    assert np.mean(shares) == pytest.approx(1 - UNLIKE_FROM / 100, abs=0.01)
    assert np.mean(means) == pytest.approx(50, abs=1)


@pytest.mark.parametrize(
    ("mean", "num", "expected"),
    [
        (52, 100, "they look like the training images"),
        (68, 100, "expect accuracy below the card's"),
        (90, 100, "expect accuracy far below the card's"),
        (90, 3, "too few images to judge"),
    ],
)
def test_the_verdict_depends_on_the_mean_percentile_and_on_the_number(mean: float, num: int, expected: str) -> None:
    features, labels = draws(0, 60)
    verdict = TrainingFeatures.fit(features, labels, draws(1, 100)[0]).verdict(mean, num // 2, num)
    assert expected in verdict
    assert f"{100 * (num // 2) / num:.0f} % of these {num} image" in verdict


def test_a_summary_survives_its_arrays_and_is_small() -> None:
    features = np.random.default_rng(0).normal(size=(300, 2048)).astype(np.float32)
    summary = TrainingFeatures.fit(features, np.arange(300) % 30, features[:50])
    arrays = summary.arrays()
    assert sum(array.nbytes for array in arrays.values()) < 5e6
    again = TrainingFeatures.of_arrays(arrays)
    assert (again.distances(features) == summary.distances(features)).all()
    assert (again.num_training, again.num_reference) == (300, 50)


@pytest.mark.parametrize("name", ["means_KD", "variances_R", "reference", "variance_of_rest"])
def test_arrays_that_do_not_belong_together_are_refused(name: str) -> None:
    features, labels = draws(0, 30)
    arrays = TrainingFeatures.fit(features, labels, features).arrays()
    with pytest.raises(ValueError, match="it"):
        TrainingFeatures.of_arrays(
            arrays | {name: np.zeros_like(arrays[name])[:0] if arrays[name].size > 1 else np.zeros(1)}
        )
    with pytest.raises(KeyError):
        TrainingFeatures.of_arrays({key: value for key, value in arrays.items() if key != name})


def test_features_that_are_all_equal_have_finite_distances() -> None:
    summary = TrainingFeatures.fit(np.ones((5, 4)), np.zeros(5, int), np.ones((2, 4)))
    assert np.isfinite(summary.distances(np.arange(8.0).reshape(2, 4))).all()


@pytest.mark.parametrize(("num_reference", "is_judged"), [(6, False), (19, False), (20, True)])
def test_a_folder_is_not_judged_by_too_few_images_to_compare_with(num_reference: int, is_judged: bool) -> None:
    rng = np.random.default_rng(0)
    fitted = TrainingFeatures.fit(rng.normal(size=(40, 3)), np.arange(40) % 2, rng.normal(size=(num_reference, 3)))
    assert ("not judged" not in fitted.verdict(30.0, 0, 50)) == is_judged
