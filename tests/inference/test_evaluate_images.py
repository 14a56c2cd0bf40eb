"""Images of another site: the same answers as from shards and predict, classes, near-duplicates, and the drop."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from small_run import BINS, CARD, CLASSES, random_weights, write_image, write_images, write_shards

from wasteddp.cli import main
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.decisions.unlikeness import UNLIKE_FROM, TrainingFeatures
from wasteddp.errors import BundleError
from wasteddp.inference.any_classifier import load_features, save_features
from wasteddp.inference.bundle import load_bundle, read_card, save_bundle
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.comparison import Accuracy, by_unlikeness, difference, near_by_hashes, near_by_manifest
from wasteddp.tools.verify_run import verify_run
from wasteddp.training.features import choose_samples


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with images, shards and the features of training images."""
    folder = tmp_path_factory.mktemp("original")
    counts = {"train": (9, 8, 7), "val": (6, 5, 4), "test": (5, 3, 2)}
    manifest = write_shards(folder / "shards", write_images(folder / "images", counts), BINS)
    card = replace(CARD, hashes=replace(CARD.hashes, manifest=manifest.sha256))
    save_bundle(folder / "run" / "model", card, random_weights())
    (folder / "run" / "settings.yaml").write_text(f"data: {{shards: {folder / 'shards'}}}\n")
    assert main(["features", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def message(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return message


def record_of(run: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "evaluations" / name / "metrics.json").read_text())
    return content


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- features in the bundle -------------------------------------------------------------------------------------------


def test_the_command_summarises_all_images_and_leaves_the_weights(original: Path) -> None:
    classifier = Classifier.load(original / "run", device="cpu")
    manifest = Manifest.load(original / "shards")
    features, labels = {}, {}
    for split in ("train", "val"):
        with SplitReader(manifest, split) as reader:
            views = [classifier.view(reader.read(sample)) for sample in range(reader.num_samples)]
            features[split], labels[split] = classifier.probabilities_and_features(views)[1], reader.labels
    expected = TrainingFeatures.fit(features["train"], labels["train"], features["val"])
    assert classifier.training is not None
    for name, array in expected.arrays().items():
        assert (classifier.training.arrays()[name] == array).all(), name
    _, weights = load_bundle(original / "run")
    assert all((weights[name] == tensor).all() for name, tensor in random_weights().items())


def test_features_are_the_inputs_of_the_last_layer_and_change_no_probability(original: Path) -> None:
    classifier = Classifier.load(original / "run", device="cpu", tta="flip")
    card, weights = load_bundle(original / "run")
    views = [classifier.view(path.read_bytes()) for path in sorted((original / "images").rglob("*.jpg"))[:11]]
    plain = Classifier(card, weights, device="cpu")
    probabilities, features = plain.probabilities_and_features(views)
    logits = features @ weights["fc.weight"].numpy().T + weights["fc.bias"].numpy()
    exps = np.exp(logits - logits.max(1, keepdims=True))
    assert probabilities == pytest.approx(exps / exps.sum(1, keepdims=True), abs=1e-5)
    assert (classifier.probabilities_and_features(views)[1] == features).all(), "those of the views without flips"
    assert plain.answers(views)[1] == [None] * 11


def test_new_weights_drop_the_features_and_an_old_bundle_has_none(run: Path) -> None:
    card = read_card(run / "model")
    assert (run / "model" / card.file_names[-1]).is_file()
    new = save_bundle(run / "model", replace(card, hashes=replace(card.hashes, features="")), random_weights(1))
    there = {path.name for path in (run / "model").iterdir()}
    assert there - {"README.md"} == set(new.file_names)
    assert load_features(run, new) is None
    with pytest.raises(BundleError, match="has new weights"):
        save_features(run, TrainingFeatures.fit(np.eye(3), np.zeros(3), np.eye(3)), weights=card.hashes.weights)


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_damaged_features_are_refused(run: Path, refused: Callable[..., str], damage: str) -> None:
    file = run / "model" / read_card(run / "model").file_names[-1]
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    assert f"{file} cannot be used" in refused("evaluate", run)
    assert any(str(file.name) in line for line in verify_run(run).damaged)


def test_features_of_another_set_are_refused(run: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    write_shards(tmp_path / "other", write_images(tmp_path / "images", {"train": (2, 2, 2), "test": (5, 3, 2)}), BINS)
    assert "is not the shard set that this model was trained on" in refused(
        "features", run, "--shards", tmp_path / "other"
    )


def test_samples_are_evenly_taken_from_classes_and_from_few_shards() -> None:
    labels = np.array([0] * 100 + [1] * 10 + [2] * 50)
    chosen = choose_samples(labels, np.arange(160) % 2, 60)
    assert np.bincount(labels[chosen]).tolist() == [25, 10, 25]
    assert (np.diff(chosen) > 0).all()
    shards = np.repeat(np.arange(80), 2)
    assert len(np.unique(shards[choose_samples(labels, shards, 60)])) <= 16
    assert choose_samples(labels, shards * 0, 500).tolist() == list(range(160))


# --- predict ----------------------------------------------------------------------------------------------------------


def test_predict_gives_each_image_its_percentile_and_the_folder_a_verdict(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = original / "images" / "test"
    white = tmp_path / "white.png"
    Image.new("RGB", (48, 40), "white").save(white)
    out = ["--csv", str(tmp_path / "out.csv"), "--json", str(tmp_path / "out.json")]
    assert main(["predict", str(original / "run"), str(images), str(white), *out]) == 0
    printed = capsys.readouterr().out.splitlines()
    classifier = Classifier.load(original / "run", device="cpu")
    assert classifier.training is not None
    rows = rows_of(tmp_path / "out.csv")
    for row, line in zip(rows, printed[1:12], strict=True):
        _, features = classifier.probabilities_and_features([classifier.view(Path(row["path"]).read_bytes())])
        percentile = classifier.training.percentiles(classifier.training.distances(features))[0]
        assert row["unlike"] == f"{percentile:.1f}"
        assert f"{percentile:.1f}{'!' if percentile >= UNLIKE_FROM else ' '}" in line
    found = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert [f"{one['unlike']:.1f}" for one in found] == [row["unlike"] for row in rows]
    percentiles = np.array([float(row["unlike"]) for row in rows])
    assert classifier.training.verdict_of(percentiles) in printed


# --- evaluate --images ------------------------------------------------------------------------------------------------


def test_images_get_what_the_same_images_get_from_shards(run: Path, original: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(run)]) == 0
    expected = {row["source"].removeprefix("test/"): row for row in rows_of(run / "evaluations/test/predictions.csv")}
    with ZipFile(tmp_path / "site.zip", "w") as archive:
        for path in sorted((original / "images" / "test").rglob("*.jpg")):
            archive.write(path, path.relative_to(original / "images" / "test"))
    table = tmp_path / "table.csv"
    lines = [f"{original}/images/test/{name},{name.split('/')[0]}" for name in expected]
    table.write_text("\n".join(["path,label", *lines]))
    for where, name in (
        (original / "images" / "test", "images-test"),
        (tmp_path / "site.zip", "site"),
        (table, "table"),
    ):
        assert main(["evaluate", str(run), "--images", str(where), "--workers", "2"]) == 0
        found = rows_of(run / "evaluations" / name / "predictions.csv")
        assert len(found) == 10
        for row in found:
            same = expected["/".join(row.pop("source").split("/")[-2:])]
            assert row == {key: value for key, value in same.items() if key != "source"}
        record, home = record_of(run, name), record_of(run, "test")
        assert record["confusion"] == home["confusion"]
        assert record["by_unlikeness"] == home["by_unlikeness"]
        assert record["home"]["drop"] == 0
        assert record["home"]["drop_low"] < 0 < record["home"]["drop_high"]
        assert record["classes_without_images"] == []


def test_a_photograph_is_turned_by_its_exif_orientation(run: Path, tmp_path: Path) -> None:
    source = write_image(tmp_path / "glass.png", 3)
    with Image.open(source) as image:
        upright, turned = tmp_path / "site/glass/a.png", tmp_path / "site/glass/b.png"
        upright.parent.mkdir(parents=True)
        image.save(upright)
        exif = Image.Exif()
        exif[0x0112] = 8
        image.transpose(Image.Transpose.ROTATE_270).save(turned, exif=exif)
    assert main(["evaluate", str(run), "--images", str(tmp_path / "site")]) == 0
    one, other = rows_of(run / "evaluations/site/predictions.csv")
    assert {**one, "source": ""} == {**other, "source": ""}


def test_other_names_are_mapped_and_unknown_ones_refused(
    run: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, {"site": (2, 3, 1)}, ("Vidrio", "metal", "wood"))
    message = refused("evaluate", run, "--images", tmp_path / "site")
    assert "classes that the model does not know: Vidrio (2 images), wood (1 images)" in message
    assert "`Vidrio: glass`" in message
    assert "--ignore Vidrio" in message
    assert not (run / "evaluations").exists()
    write_images(tmp_path, {"other": (1, 1, 1)}, ("glass", "metal", "Paper"))
    assert "`Paper: paper`" in refused("evaluate", run, "--images", tmp_path / "other")
    (tmp_path / "table.csv").write_text("path,label\nno.jpg,glass\nneither.jpg,metal\n")
    assert "2 of the 2 files of" in refused("evaluate", run, "--images", tmp_path / "table.csv")
    names = tmp_path / "names.yaml"
    names.write_text("Vidrio: glass\n")
    options = ["--classes", str(names), "--ignore", "wood", "--name", "plant 2"]
    assert main(["evaluate", str(run), "--images", str(tmp_path / "site"), *options]) == 0
    record, output = record_of(run, "plant 2"), capsys.readouterr().out
    assert [one["support"] for one in record["per_class"]] == [2, 3, 0]
    assert record["classes_without_images"] == ["paper"]
    assert output.count("no images of 1 of the 3 classes: paper; the macro figures are means over the others") == 1
    assert "macro F1, of 2 of 3 classes" in output
    assert "home test: not compared: there is no" in output
    assert "home" not in record
    names.write_text("Glas: glass\n")
    assert "has no class Glas" in refused("evaluate", run, "--images", tmp_path / "site", "--classes", names)


def test_unreadable_images_are_named_and_not_counted(
    run: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, {"site": (1, 2, 1)})
    for number in range(12):
        (tmp_path / "site" / "metal" / f"9{number:02}.jpg").write_bytes(b"no image")
    assert main(["evaluate", str(run), "--images", str(tmp_path / "site")]) == 0
    output, record = capsys.readouterr().out, record_of(run, "site")
    assert record["num_samples"] == 4
    assert len(record["unreadable"]) == 12
    assert "12 image(s) could not be read and are not counted" in output
    assert "metal/900.jpg: unreadable" in output
    assert "and 2 more, listed in metrics.json" in output
    for path in (tmp_path / "site").rglob("?.jpg"):
        path.unlink()
    shutil.rmtree(tmp_path / "site" / "glass")
    shutil.rmtree(tmp_path / "site" / "paper")
    assert "none of the 12 images can be read" in refused("evaluate", run, "--images", tmp_path / "site")


def test_a_home_of_other_weights_is_not_compared(run: Path, original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run)]) == 0
    path = run / "evaluations" / "test" / "metrics.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "hashes": {**record["hashes"], "weights": "0" * 64}}))
    assert main(["evaluate", str(run), "--images", str(original / "images" / "test")]) == 0
    assert "is of other weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "absent"], "there is no absent"),
        (["--name", "x"], "--name was given without --images"),
        (["--images", ".", "--name", "val"], "would be called 'val'"),
        (["--images", ".", "--name", "../up"], "would be called '../up'"),
        (["--images", ".", "--workers", "2 processes"], "decoded by threads"),
    ],
)
def test_wrong_options_are_one_message(
    run: Path, refused: Callable[..., str], options: list[str], message: str
) -> None:
    assert message in refused("evaluate", run, *options)


def test_several_processes_are_refused(run: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several processes" in refused("evaluate", run, "--images", "x")


# --- near-duplicates and comparisons ----------------------------------------------------------------------------------


def test_accuracy_without_near_duplicates_of_training_images(run: Path, original: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(original / "images" / "test", site)
    with Image.open(original / "images/train/glass/0.jpg") as image:
        image.save(site / "glass" / "again.jpg", quality=60)
    assert main(["evaluate", str(run), "--images", str(site), "--near-duplicates"]) == 0
    near, rows = record_of(run, "site")["near_duplicates_in_train"], rows_of(run / "evaluations/site/predictions.csv")
    assert near["num_near"] == 1
    others = [row["true"] == row["predicted"] for row in rows if not row["source"].endswith("again.jpg")]
    assert near["without"]["num_images"] == len(others) == 10
    assert near["without"]["num_correct"] == sum(others)
    assert near["with"]["num_images"] == 11


def test_sharding_and_the_hashes_find_the_same_near_duplicates(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"train": (3, 3, 3), "test": (5, 3, 2)})
    for name, number in (("metal", 1), ("paper", 2)):
        with Image.open(tmp_path / f"images/train/{name}/{number}.jpg") as image:
            image.save(tmp_path / f"images/test/{name}/copy.jpg", quality=70)
    manifest = write_shards(tmp_path / "shards", tmp_path / "images", BINS)
    with SplitReader(manifest, "train") as train, SplitReader(manifest, "test") as test:
        sources = [test.source(sample) for sample in range(test.num_samples)]
        by_hashes = near_by_hashes(train, (test.read(sample) for sample in range(test.num_samples)))
    expected = [source.endswith("copy.jpg") for source in sources]
    assert by_hashes.tolist() == expected
    flags = near_by_manifest(manifest, "test", "train", sources)
    assert flags is not None
    assert flags.tolist() == expected
    assert near_by_manifest(replace(manifest, near_duplicates={}), "test", "train", sources) is None
    cut = {**manifest.near_duplicates, "pairs": manifest.near_duplicates["pairs"][:1]}
    assert near_by_manifest(replace(manifest, near_duplicates=cut), "test", "train", sources) is None


def test_degrees_of_unlikeness_are_those_of_a_loop() -> None:
    random = np.random.default_rng(0)
    unlike, right = random.choice([0, 12, 50, 89.9, 90, 94.9, 95, 100], 300), random.random(300) < 0.6
    for low, high, found in by_unlikeness(unlike, right):
        inside = [r for u, r in zip(unlike, right, strict=True) if low <= u < high or u == high == 100]
        assert (found.num_correct, found.num_images) == (sum(inside), len(inside))
    assert sum(part.num_images for _, _, part in by_unlikeness(unlike, right)) == 300


def test_the_drop_has_the_interval_of_newcombes_example() -> None:
    """Newcombe 1998, table II, row (a), method 10: 56/70 and 48/80."""
    gap, low, high = difference(Accuracy(56, 70), Accuracy(48, 80))
    assert (gap, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_an_evaluation_is_the_same_with_features_and_without(run: Path, original: Path) -> None:
    assert main(["evaluate", str(run)]) == 0
    before = rows_of(run / "evaluations" / "test" / "predictions.csv")
    card = read_card(run / "model")
    save_bundle(run / "model", replace(card, hashes=replace(card.hashes, features="")), random_weights())
    assert main(["evaluate", str(run)]) == 0
    after = rows_of(run / "evaluations" / "test" / "predictions.csv")
    assert [{key: value for key, value in row.items() if key != "unlike"} for row in before] == after
    assert load_file(original / "run" / "model" / read_card(original / "run" / "model").file_names[-1])
    assert card.classes == CLASSES
