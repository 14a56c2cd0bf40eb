"""`wasteddp verify RUN` names each damaged part of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from trainings import config_of

from wasteddp import cli, train
from wasteddp.errors import BundleError
from wasteddp.inference.bundle import load_bundle


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert train.main([*config_of(folder, small_shards), "--set", "train.stop_at_step=4"]) == 0
    return folder / "run"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def test_an_intact_run_is_listed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(finished)]) == 0
    out = capsys.readouterr().out
    for part in ("checkpoints/step-00000004", "model/model.json", "settings.yaml", "metrics.jsonl", "evaluations/val"):
        assert part in out
    assert "README.md" not in out, "the model card is not proved"
    assert (finished / "model" / "README.md").is_file()


def test_all_damage_is_named_at_the_same_time(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flip(run / "checkpoints" / "step-00000004" / "optimizer.safetensors", 500)
    flip(next((run / "model").glob("model-*.safetensors")), 900)
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes().replace(b"}\n", b"\n", 1))
    (run / "settings.yaml").write_text("train: [")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["verify", str(run)])
    error = capsys.readouterr().err
    assert "checkpoints/step-00000004: " in error
    assert "model/model.json: " in error
    assert "metrics.jsonl: ValueError: line 1 is not a row of metrics" in error
    assert "settings.yaml: " in error


@pytest.mark.parametrize("key", ["classes", "preprocessing", "temperature", "arch", "bins"])
def test_a_changed_card_is_refused(key: str, finished: Path, tmp_path: Path) -> None:
    """Classes in another order would give other answers, without an error."""
    shutil.copytree(finished / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    card = json.loads(path.read_text())
    changes = {"classes": card["classes"][::-1], "temperature": 2.0, "arch": "resnet34", "bins": {"glass": "blue bin"}}
    card[key] = changes.get(key) or {**card["preprocessing"], "resize_px": 40}
    path.write_text(json.dumps(card))
    with pytest.raises(BundleError, match="its sha256 differs"):
        load_bundle(tmp_path / "model")


def test_a_card_in_another_layout_of_json_is_read(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=4))
    load_bundle(tmp_path / "model")
