"""An evaluation counts its split exactly once, records what it measured on, and refuses input that would falsify it."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_run import (
    CARD,
    CLASSES,
    TEST_IMAGES,
    change_manifest,
    overwrite_image,
    random_weights,
    write_images,
    write_run,
    write_shards,
)

from wasteddp.cli import main
from wasteddp.inference import evaluation_files
from wasteddp.inference.bundle import load_bundle, save_bundle
from wasteddp.inference.classifier import Classifier

FILES = ["confusion.csv", "confusion.png", "metrics.json", "predictions.csv"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run next to its images and shards, for tests that do not change them."""
    return write_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` that a test may change."""
    for name in ("run", "shards"):
        shutil.copytree(finished.parent / name, tmp_path / name, ignore=shutil.ignore_patterns("evaluations"))
    (tmp_path / "run" / "settings.yaml").write_text(f"data: {{shards: {tmp_path / 'shards'}}}\n")
    return tmp_path / "run"


def evaluate(run: Path, *options: str) -> dict[str, Any]:
    assert main(["evaluate", str(run), *options]) == 0
    content: dict[str, Any] = json.loads((run / "evaluations" / "test" / "metrics.json").read_text())
    return content


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def message(run: Path, *options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", str(run), *options])
        assert stopped.value.code == 2
        assert not (run / "evaluations").exists() or not list((run / "evaluations").rglob("metrics.json"))
        return capsys.readouterr().err

    return message


def test_an_evaluation_equals_the_prediction_of_each_image_alone(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = evaluate(finished)
    classifier = Classifier.load(finished, device="cpu")
    confusion = np.zeros((3, 3), int)
    expected = {}
    for path in (finished.parent / "images" / "test").rglob("*.jpg"):
        probabilities = classifier.probabilities([classifier.view(path.read_bytes())])[0]
        true = CLASSES.index(path.parent.name)
        confusion[true, probabilities.argmax()] += 1
        expected[f"test/{path.parent.name}/{path.name}"] = [str(p) for p in probabilities]
    assert record["confusion"] == confusion.tolist()
    assert record["num_samples"] == sum(TEST_IMAGES) == 10
    assert record["accuracy"] == np.trace(confusion) / 10
    assert [one["support"] for one in record["per_class"]] == list(TEST_IMAGES)

    folder = finished / "evaluations" / "test"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["source"]: [row[f"p_{name}"] for name in CLASSES] for row in rows} == expected
    assert all(row["true"] == row["source"].split("/")[1] for row in rows)
    with (folder / "confusion.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table == [
        ["true \\ predicted", *CLASSES],
        *([n, *map(str, r)] for n, r in zip(CLASSES, confusion, strict=True)),
    ]
    with Image.open(folder / "confusion.png") as image:
        assert image.format == "PNG"
        assert image.width > 300

    output = capsys.readouterr().out
    assert f"{10 * np.trace(confusion):.1f} % ({np.trace(confusion)} of 10)" in output
    assert "95 % interval" in output
    assert "macro F1" in output
    assert "warning" not in output
    assert all(name in output for name in CLASSES)


def test_the_record_names_data_weights_and_options(finished: Path) -> None:
    record = evaluate(finished, "--batch-size", "3", "--device", "cpu")
    card, _ = load_bundle(finished)
    manifest = (finished.parent / "shards" / "manifest.json").read_bytes()
    assert record["hashes"]["weights"] == card.hashes.weights
    assert (
        record["hashes"]["manifest"] == hashlib.sha256(manifest).hexdigest() == record["hashes"]["manifest_trained_on"]
    )
    shards = str(finished.parent / "shards")
    assert record["options"] == {"split": "test", "shards": shards, "batch_size": 3, "device": "cpu", "tta": "none"}
    assert record["model"]["trained"] == {"step": 120, "epoch": 3, "metric": "val/macro_f1", "value": 0.5}
    wrong = sum(map(sum, record["confusion"])) - sum(record["confusion"][k][k] for k in range(3))
    mistakes = record["surest_mistakes"]
    assert len(mistakes) == wrong > 0
    assert [one["probability"] for one in mistakes] == sorted((one["probability"] for one in mistakes), reverse=True)
    assert all(one["true"] == one["source"].split("/")[1] != one["predicted"] for one in mistakes)


def test_test_time_augmentation_is_in_the_record_and_in_the_answers(run: Path) -> None:
    evaluate(run)
    plain = (run / "evaluations" / "test" / "predictions.csv").read_bytes()
    assert evaluate(run, "--tta", "flips")["options"]["tta"] == "flips"
    assert (run / "evaluations" / "test" / "predictions.csv").read_bytes() != plain


def test_the_same_evaluation_writes_the_same_bytes(run: Path) -> None:
    evaluate(run)
    folder = run / "evaluations" / "test"
    before = {name: (folder / name).read_bytes() for name in FILES}
    evaluate(run)
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_a_kill_while_saving_leaves_no_metrics_beside_files_of_another_evaluation(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(run)

    def die(path: Path, content: bytes) -> None:
        if path.name == "predictions.csv":
            raise MemoryError
        path.write_bytes(content)

    monkeypatch.setattr(evaluation_files, "write_atomically", die)
    with pytest.raises(MemoryError):
        main(["evaluate", str(run)])
    assert not (run / "evaluations" / "test" / "metrics.json").exists()


def test_a_flipped_byte_stops_the_evaluation_with_the_samples_name(run: Path, refused: Callable[..., str]) -> None:
    tar = overwrite_image(run.parent / "shards", b"\xff\xd8\xff\xe0flip", fix_index=False)
    message = refused(run)
    assert f"{tar}, sample 2 at byte" in message
    assert "do not have the sha256 of the index" in message


def test_an_image_that_cannot_be_decoded_stops_the_evaluation_with_its_source(
    run: Path, refused: Callable[..., str]
) -> None:
    tar = overwrite_image(run.parent / "shards", b"no image at all", fix_index=True)
    message = refused(run)
    assert re.search(rf"{tar}, sample 2 at byte \d+ \(test/\w+/\d\.jpg\) cannot be used: unreadable", message)
    assert "would not cover the whole split" in message


def test_labels_that_the_manifest_does_not_count_are_refused(run: Path, refused: Callable[..., str]) -> None:
    wrong = [TEST_IMAGES[1], TEST_IMAGES[0], TEST_IMAGES[2]]  # the sum is right
    change_manifest(run.parent / "shards", lambda m: m["splits"]["test"].update(samples_per_class=wrong))
    message = refused(run)
    assert (
        "the manifest counts 10 samples in 'test', by class [3, 5, 2]; its index holds 10, by class [5, 3, 2]"
        in message
    )


def test_other_classes_are_refused_and_both_lists_are_shown(run: Path, refused: Callable[..., str]) -> None:
    others = ("glass", "metal", "trash")
    source = write_images(run.parent / "others", {"train": (1, 1, 1), "test": (3, 3, 3)}, others)
    write_shards(run.parent / "other-shards", source, bins={})
    message = refused(run, "--shards", str(run.parent / "other-shards"))
    assert "model:  glass, metal, paper" in message
    assert "shards: glass, metal, trash (3)" in message


def test_another_shard_set_is_measured_with_a_warning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_manifest(run.parent / "shards", lambda m: m.update(name="renamed"))
    record = evaluate(run)
    assert record["hashes"]["manifest"] != record["hashes"]["manifest_trained_on"]
    assert "is not the shard set that this model was trained on" in capsys.readouterr().out


def test_shards_come_from_the_settings_unless_they_are_named(run: Path, refused: Callable[..., str]) -> None:
    shards = str(run.parent / "shards")
    (run / "settings.yaml").write_text("data: {shards: nowhere/at/all}\n")
    assert "and there is no nowhere/at/all in " in (message := refused(run))
    assert "run the command in that folder, or name the set with --shards FOLDER" in message
    (run / "settings.yaml").write_text("model: {}\n")
    assert "does not name its shards (data.shards): 'data'" in refused(run)
    (run / "settings.yaml").unlink()
    message = refused(run)
    assert "there is no" in message
    assert "--shards FOLDER" in message
    assert evaluate(run, "--shards", shards)["num_samples"] == 10


def test_a_relative_path_in_the_settings_starts_at_the_current_directory(
    run: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "settings.yaml").write_text("data: {shards: shards}\n")
    monkeypatch.chdir(run)
    assert f"do: add --shards {run.parent / 'shards'}\n" in refused(run)
    monkeypatch.chdir(run.parent)
    assert evaluate(Path("run"))["num_samples"] == 10


def test_a_split_that_is_not_there_is_refused_with_those_that_are(run: Path, refused: Callable[..., str]) -> None:
    message = refused(run, "--split", "val")
    assert "no samples in a split called 'val'" in message
    assert "test (10)" in message


def test_a_run_without_a_model_is_refused(run: Path, refused: Callable[..., str]) -> None:
    shutil.rmtree(run / "model")
    assert "has no model/model.json yet" in refused(run)


def test_class_names_that_look_like_markup_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = ("[bold]x", "a" * 60, "c $x$")
    source = write_images(tmp_path / "images", {"train": (1, 1, 1), "test": (3, 3, 3)}, classes)
    manifest = write_shards(tmp_path / "shards", source, bins={})
    card = replace(CARD, classes=manifest.classes, bins={})
    save_bundle(tmp_path / "run" / "model", card, random_weights())
    evaluate(tmp_path / "run", "--shards", str(tmp_path / "shards"))
    assert "[bold]x" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_batch_size_that_is_no_count_is_refused(finished: Path, value: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(finished), "--batch-size", value])
    assert stopped.value.code == 2
