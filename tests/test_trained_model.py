"""`wasteddp.load`: paths, bytes, images and arrays have the answers of `wasteddp predict`; the public names."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import BINS, CARD, CLASSES, random_weights, write_image

import wasteddp
from wasteddp.cli import main
from wasteddp.decisions.decide import BinRules, Policy
from wasteddp.decisions.thresholds import ErrorThreshold
from wasteddp.inference.bundle import read_card, save_bundle
from wasteddp.inference.policy_files import ChosenPolicy, save_policy

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(folder, CARD, random_weights())
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    return [write_image(folder / f"{seed}.{('png', 'jpg')[seed % 2]}", seed) for seed in range(10)]


def test_answers_are_those_of_the_command(bundle: Path, photos: list[Path], tmp_path: Path) -> None:
    assert main(["predict", str(bundle), *map(str, photos), "--csv", str(tmp_path / "out.csv")]) == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    answers = wasteddp.load(bundle).predict(photos)
    assert len(answers) == len(rows) == 10
    for answer, row in zip(answers, rows, strict=True):
        assert {name: str(np.float32(p)) for name, p in answer.probabilities.items()} == {
            name: str(np.float32(row[f"p_{name}"])) for name in CLASSES
        }
        assert (answer.class_name, answer.bin) == (row["class"], row["bin"])
        assert answer.probability == answer.probabilities[answer.class_name] == max(answer.probabilities.values())
        assert (answer.decision, answer.unlikeness) == (None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        answers[0].probability = 1.0  # type: ignore[misc]


def test_all_kinds_of_inputs_of_the_same_pixels_have_the_same_answer(bundle: Path, photos: list[Path]) -> None:
    model, path = wasteddp.load(bundle), photos[0]
    pixels = np.asarray(Image.open(path).convert("RGB"))
    (expected,) = model.predict(path)
    mixed = [str(path), path.read_bytes(), Image.open(path), Image.fromarray(pixels).convert("RGBA"), pixels]
    assert model.predict(mixed) == [expected] * 5
    assert model.predict(pixels) == model.predict(np.stack([pixels, pixels]))[:1] == [expected]
    assert model.predict(iter(())) == []
    data = path.read_bytes()
    assert model.predict(bytearray(data)) == model.predict([memoryview(data)]) == [expected]
    assert model.predict(pixels[:, :, ::-1].copy()[:, :, ::-1]) == [expected]  # as a BGR array of OpenCV
    turned = Image.fromarray(np.rot90(pixels, axes=(0, 1)).copy())  # 90 degrees counter-clockwise; 6: turn it back
    turned.getexif()[0x0112] = 6
    assert model.predict(turned) == [expected]
    line = np.asarray(Image.new("RGB", (40, 1), "red"))
    assert len(model.predict([line[::-1, ::-1], line[:1, :1][::-1, ::-1]])) == 2
    assert model.features(mixed).shape == (5, model.features(path).shape[1])
    assert model.features([]).shape[0] == 0
    assert (model.features(mixed) == model.features(path)).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("absent.jpg", r"input 1 \(absent.jpg\) cannot be read: No such file"),
        (b"", "input 1 cannot be read: empty"),
        (b"text", "input 1 cannot be read: unreadable"),
        (np.zeros((4, 4, 3), np.float32), r"input 1 is not an image, but: array of float32 \[4, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), r"array of uint8 \[4, 4\]"),
        (None, "input 1 is not an image, but: NoneType"),
    ],
)
def test_an_input_that_is_no_image_is_named(bundle: Path, photos: list[Path], bad: object, message: str) -> None:
    with pytest.raises(wasteddp.WastedError, match=message):
        wasteddp.load(bundle).predict([photos[0], bad])  # type: ignore[list-item]


def test_something_else_than_inputs_is_named(bundle: Path, photos: list[Path]) -> None:
    model = wasteddp.load(bundle)
    for bad, what in ((None, "NoneType"), (5, "int"), (io.BytesIO(photos[0].read_bytes()), "BytesIO")):
        with pytest.raises(wasteddp.WastedError, match=f"input 0 is not an image, but: {what}"):
            model.predict(bad)  # type: ignore[arg-type]


def test_threads_share_a_model(bundle: Path, photos: list[Path]) -> None:
    model = wasteddp.load(bundle)
    answers, features = model.predict(photos), model.features(photos)

    def ask(number: int) -> bool:
        at = number % len(photos)
        return model.predict(photos[at]) == [answers[at]] and bool((model.features(photos[at]) == features[at]).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(40)))
    large = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)).save(large, "JPEG")
    once = model.predict(Image.open(large))
    assert model.predict([Image.open(large)] * 40) == once * 40  # read by the first thread that uses it


def test_a_fork_of_a_loaded_model_is_refused_instead_of_waiting_for_ever(
    bundle: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wasteddp.load(bundle, device="cpu")
    monkeypatch.setattr("os.getpid", lambda: -1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    with pytest.raises(wasteddp.WastedError, match="load the model in each process"):
        model.predict(photos[0])
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert len(model.predict(photos[0])) == 1


def test_a_policy_decides(bundle: Path, photos: list[Path], tmp_path: Path) -> None:
    policy = Policy(BinRules.of_map(BINS, CLASSES), ErrorThreshold(0.9, 0.05, 0.95, 0.04, 50, 40, 0))
    save_policy(tmp_path / "policy.json", ChosenPolicy(policy, "val"), read_card(bundle), tta="none")
    answers = wasteddp.load(bundle, policy=tmp_path / "policy.json").predict(photos)
    for answer in answers:
        expected = ("person", "doubt") if answer.probability < 0.9 else (BINS[answer.class_name], "")
        assert (answer.decision, answer.why) == expected
    assert len({answer.decision for answer in answers}) > 1


def test_the_public_names_are_there_documented_and_imported_only_when_used() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    for name in wasteddp.__all__:
        assert getattr(wasteddp, name) is not None
        assert f"wasteddp.{name}" in page
        assert name in dir(wasteddp)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = wasteddp.nothing_like_this
    code = "import sys, wasteddp; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readme_s_python_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    block = re.search(r"In Python[^\n]*:\n\n((?:    .*\n|\n)+)", text)
    assert block
    snippet = re.sub(r"^    ", "", block[1], flags=re.MULTILINE)
    assert "wasteddp.load(" in snippet
    save_bundle(tmp_path / "runs" / "mine" / "model", CARD, random_weights())
    for number in (1, 2):
        write_image(tmp_path / "new" / f"{number}.jpg", number)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(snippet, found)
    assert [answer.class_name in CLASSES for answer in found["answers"]] == [True] * 2  # type: ignore[attr-defined]
