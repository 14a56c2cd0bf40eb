"""`wasteddp calibrate` and the calibration of a training's best model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_run import CARD, random_weights, write_images, write_shards

from wasteddp import cli
from wasteddp.decisions.calibration import Calibration, calibrate, scaled
from wasteddp.inference.bundle import read_card, save_bundle
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.metrics import Answers, Mistakes, Reliability, Seen
from wasteddp.tools import model_additions as calibrating
from wasteddp.training import evaluate
from wasteddp.training.checkpoint import best_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    counts = {"train": (1, 1, 1), "val": (2, 2, 2), "test": (3, 3, 3)}
    write_shards(folder / "shards", write_images(folder / "images", counts), dict(CARD.bins))
    save_bundle(folder / "run" / "model", CARD, random_weights())
    (folder / "run" / "settings.yaml").write_text(f"data:\n  shards: {folder / 'shards'}\n")
    return folder / "run"


def overconfident(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels that are right less often than the probabilities say, and the probabilities."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(3) * 0.2, count).astype(np.float32)
    true = scaled(shares, 3.0)
    return (true.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1), shares


def test_the_card_gets_a_temperature_and_predictions_change_with_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, shares = overconfident(300)
    asked = []

    def measured(classifier: Classifier, *rest: object) -> SimpleNamespace:
        asked.append(classifier.card.temperature)
        return SimpleNamespace(labels=labels, probabilities_NK=shares, groups=None)

    monkeypatch.setattr(calibrating, "evaluate_split", measured)
    plain = probabilities_of(run)
    assert cli.main(["calibrate", str(run)]) == 0
    card = read_card(run / "model")
    found = Calibration.from_json(card.calibration)
    assert card.temperature == found.temperature == pytest.approx(3.0, rel=0.4)
    said = " ".join(capsys.readouterr().out.split())
    assert f"temperature {found.temperature:.3f}, from 300 images of val" in said
    np.testing.assert_allclose(probabilities_of(run), scaled(plain, found.temperature), atol=1e-5)
    assert cli.main(["calibrate", str(run)]) == 0
    assert asked == [1.0, 1.0], "again from the logits as the network gives them"


def probabilities_of(run: Path) -> np.ndarray:
    model = Classifier.load(run)
    return model.probabilities([np.full((32, 32, 3), level, np.uint8) for level in (0, 90, 255)])


def test_too_few_images_leave_the_card_as_it_was(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "model" / "model.json").read_bytes()
    with pytest.raises(SystemExit):
        cli.main(["calibrate", str(run), "--split", "test"])
    assert "too few to calibrate the probabilities" in capsys.readouterr().err
    assert (run / "model" / "model.json").read_bytes() == before


@pytest.mark.parametrize("count", [4, 400])
def test_a_best_model_is_calibrated_where_its_evaluation_has_enough_images(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, shares = overconfident(count)
    answers = Answers.from_probabilities(labels, shares)
    found = Reliability.measure(answers), Mistakes.find(answers)
    seen = Seen("val", CARD.classes, np.zeros((3, 3), np.int64), None, *found, labels, shares)  # type: ignore[arg-type]
    evaluated = []
    monkeypatch.setattr(best_model, "save_seen", lambda folder, seen, source, card, **how: evaluated.append(card))

    class Anything:
        def __getattr__(self, name: str) -> Anything:
            return self

        def __fspath__(self) -> str:
            return str(tmp_path)

    anything: object = Anything()
    card = replace(CARD, temperature=1.0)
    best_model.save_best(
        random_weights(),
        card=card,
        seen=seen,
        out=tmp_path,
        shards="shards",
        runtime=anything,  # type: ignore[arg-type]
        data=anything,  # type: ignore[arg-type]
    )
    saved = read_card(tmp_path / "model")
    assert bool(saved.calibration) == (count == 400)
    assert (saved.temperature == 1.0) == (count == 4)
    assert evaluated[0].temperature == 1.0, "the evaluation that a training makes is of the model without calibration"
    assert evaluated[0].hashes.weights == saved.hashes.weights


def test_the_split_that_the_model_was_trained_on_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["calibrate", str(run), "--split", "train"])
    assert left.value.code == 2
    assert "the model was trained on the images of train" in capsys.readouterr().err


def test_weights_that_a_training_replaced_meanwhile_are_not_given_the_temperature_of_the_old_ones(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, shares = overconfident(300)

    def measured(*_: object) -> SimpleNamespace:
        save_bundle(run / "model", CARD, random_weights(seed=1))
        return SimpleNamespace(labels=labels, probabilities_NK=shares, groups=None)

    monkeypatch.setattr(calibrating, "evaluate_split", measured)
    with pytest.raises(SystemExit):
        cli.main(["calibrate", str(run)])
    assert "has new weights" in capsys.readouterr().err
    assert read_card(run / "model").temperature == CARD.temperature


def test_probabilities_of_all_ranks_are_in_the_order_of_the_split() -> None:
    shares = np.arange(10, dtype=np.float32).reshape(5, 2)
    labels = np.arange(5)
    parts = [(rows, labels[rows], shares[rows]) for rows in (np.array([3, 0]), np.array([4, 1, 2]))]
    found_labels, found_shares = evaluate._in_order(parts)
    np.testing.assert_array_equal(found_labels, labels)
    np.testing.assert_array_equal(found_shares, shares)
    assert evaluate._in_order([]) == (None, None)


def test_a_training_reports_whether_its_model_is_calibrated(tmp_path: Path) -> None:
    assert best_model.describe_calibration(tmp_path) == ""
    save_bundle(tmp_path / "model", CARD, random_weights())
    assert "not calibrated" in best_model.describe_calibration(tmp_path)
    labels, shares = overconfident(300)
    found = calibrate(labels, shares, split="val")
    card = replace(CARD, temperature=found.temperature, calibration=found.to_json())
    save_bundle(tmp_path / "model", card, random_weights())
    assert best_model.describe_calibration(tmp_path) == "probabilities: calibrated on 300 images of val"
