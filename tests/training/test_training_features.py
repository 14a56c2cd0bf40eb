"""At its end a training adds the features of its training images to the model, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainings import config_of, final_weights, rows

from wasteddp import train
from wasteddp.errors import ShardError
from wasteddp.inference.any_classifier import load_features
from wasteddp.inference.bundle import load_bundle
from wasteddp.training import features


def test_a_training_ends_with_features_that_change_neither_weights_nor_order(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        assert train.main(config_of(tmp_path / name, small_shards)) == 0
        monkeypatch.setattr(features, "summarise_training", _fail)
    card, weights = load_bundle(tmp_path / "with" / "run")
    kept = load_features(tmp_path / "with" / "run", card)
    assert kept is not None
    assert (kept.num_training, kept.num_reference) == (50, 13)
    log = (tmp_path / "with" / "run" / "log.txt").read_text()
    assert "features of 50 training images kept, compared with 13 of val" in log

    plain, same = load_bundle(tmp_path / "without" / "run")
    assert not plain.hashes.features
    assert plain.hashes.weights == card.hashes.weights
    assert weights.keys() == same.keys()
    assert final_weights(tmp_path / "with" / "run") == final_weights(tmp_path / "without" / "run")
    losses = [[row["train/loss"] for row in rows(tmp_path / name / "run")] for name in ("with", "without")]
    assert losses[0] == losses[1]
    log = (tmp_path / "without" / "run" / "log.txt").read_text()
    assert "features of training images: not kept, no image" in log
    assert "finished at step 8" in log


def test_a_finished_run_that_is_started_again_keeps_its_features(small_shards: Path, tmp_path: Path) -> None:
    assert train.main(config_of(tmp_path, small_shards)) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "model").iterdir()}
    assert train.main(config_of(tmp_path, small_shards)) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "model").iterdir()} == before


def _fail(*_: object, **__: object) -> None:
    raise ShardError("no image", "", "")
