"""An image gets the same probabilities, bit for bit, with any other images in its batch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import CARD, random_weights, write_image
from trainings import ROOT

from wasteddp.data.decoding.decode import ImageHWC
from wasteddp.errors import BundleError, LaunchError
from wasteddp.inference.bundle import save_bundle
from wasteddp.inference.classifier import BATCH_SIZE_CPU, Classifier
from wasteddp.model.networks import build

RNG = np.random.default_rng(0)


def random_views(count: int) -> list[ImageHWC]:
    return list(RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(folder, CARD, random_weights())
    return folder


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Classifier:
    return Classifier.load(folder, device="cpu")


def slowly(views: list[ImageHWC], temperature: float = 1.0) -> np.ndarray:
    """Return the softmax of the bare model's logits, one image at a time, in float64."""
    model = build("resnet18", 3).double().eval()
    model.load_state_dict(random_weights())
    rows = []
    for view in views:
        pixels = [[(view[:, :, c] / 255.0 - CARD.preprocessing.mean[c]) / CARD.preprocessing.std[c]] for c in range(3)]
        with torch.no_grad():
            logits = model(torch.from_numpy(np.concatenate(pixels))[None])[0].numpy() / temperature
        rows.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
    return np.array(rows)


def test_probabilities_are_the_softmax_of_the_models_logits(classifier: Classifier) -> None:
    views = random_views(3)
    found = classifier.probabilities(views)
    assert found.dtype == np.float32
    assert found == pytest.approx(slowly(views), abs=1e-4)
    assert len({row.tobytes() for row in found}) == 3, (
        "this model gives all images the same output: the test would prove nothing"
    )


@pytest.mark.parametrize("count", [0, 1, BATCH_SIZE_CPU - 1, BATCH_SIZE_CPU, BATCH_SIZE_CPU + 1, 2 * BATCH_SIZE_CPU])
def test_any_number_of_images_is_answered(classifier: Classifier, count: int) -> None:
    views = random_views(count)
    found = classifier.probabilities(views)
    assert found.shape == (count, 3)
    for ends in {0, count - 1} if count else ():
        assert classifier.probabilities([views[ends]])[0].tobytes() == found[ends].tobytes()


def test_neither_place_nor_company_in_a_batch_changes_a_bit(classifier: Classifier) -> None:
    probe = random_views(1)[0]
    answers = set()
    for place in range(BATCH_SIZE_CPU):
        company = random_views(BATCH_SIZE_CPU)
        company[place] = probe
        answers.add(classifier.probabilities(company)[place].tobytes())
    assert len(answers) == 1


@pytest.mark.processes
def test_linear_layers_of_an_intel_cpu_without_avx512_have_the_same_bits_at_each_place() -> None:
    """MKL takes the kernels of such a CPU, on one of Intel. Without `_Alone`, all of these but the last differ."""
    code = """
import torch
from wasteddp.inference.classifier import _Alone

torch.set_num_threads(1)
for outputs, rows in [(3, ()), (6, ()), (1024, ()), (384, (2, 2)), (384, (49,))]:
    layer = torch.nn.Linear(512, outputs)
    alone, image = _Alone(layer, 8), torch.randn(*rows, 512)
    found = set()
    for place in range(8):
        images = torch.randn(8, *rows, 512)
        images[place] = image
        with torch.inference_mode():
            answers = alone(images)
            torch.testing.assert_close(answers, layer(images))
        found.add(answers[place].numpy().tobytes())
    print(outputs, len(found))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MKL_CBWR": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["3 1", "6 1", "1024 1", "384 1", "384 1"]


@pytest.mark.parametrize(("tta", "flips"), [("flip", [(), (1,)]), ("flips", [(), (1,), (0,), (0, 1)])])
def test_test_time_augmentation_is_the_mean_of_the_flips_probabilities(
    folder: Path, tta: str, flips: list[tuple[int, ...]]
) -> None:
    views = random_views(3)
    expected = np.mean([slowly([np.flip(view, axes) for view in views]) for axes in flips], axis=0)
    found = Classifier.load(folder, device="cpu", tta=tta).probabilities(views)
    assert found == pytest.approx(expected, abs=1e-4)
    assert np.abs(found - slowly(views)).max() > 1e-3, "the flips make no difference: the test would prove nothing"


def test_with_all_flips_an_image_upside_down_gets_the_same_answer_to_the_last_bit(folder: Path) -> None:
    classifier = Classifier.load(folder, device="cpu", tta="flips")
    views = random_views(BATCH_SIZE_CPU + 1)
    answers = classifier.probabilities(views)
    for axes in ((0,), (1,), (0, 1)):
        flipped = [np.ascontiguousarray(np.flip(view, axes)) for view in reversed(views)]  # in other batches, too
        assert classifier.probabilities(flipped)[::-1].tobytes() == answers.tobytes()


def test_the_temperature_divides_the_logits(tmp_path: Path) -> None:
    save_bundle(tmp_path, replace(CARD, temperature=2.5), random_weights())
    views = random_views(2)
    found = Classifier.load(tmp_path, device="cpu").probabilities(views)
    assert found == pytest.approx(slowly(views, temperature=2.5), abs=1e-4)


def test_a_model_saved_in_bf16_answers_in_fp32(tmp_path: Path) -> None:
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in random_weights().items()}
    save_bundle(tmp_path, CARD, half)
    assert Classifier.load(tmp_path, device="cpu").probabilities(random_views(1)).dtype == np.float32


def test_the_view_has_the_bundles_size(classifier: Classifier, tmp_path: Path) -> None:
    view = classifier.view(write_image(tmp_path / "photo.jpg", 1, size=(90, 50)).read_bytes())
    assert view.shape == (32, 32, 3)
    assert view.dtype == np.uint8


def test_batches_hold_every_item_once(classifier: Classifier) -> None:
    assert [len(batch) for batch in classifier.batches(range(2 * BATCH_SIZE_CPU + 1))] == [8, 8, 1]
    assert list(classifier.batches(range(BATCH_SIZE_CPU))) == [list(range(BATCH_SIZE_CPU))]
    assert list(classifier.batches([])) == []


def test_a_diverged_model_is_refused_instead_of_naming_the_first_class(tmp_path: Path) -> None:
    state = random_weights()
    state["fc.bias"][1] = float("nan")
    save_bundle(tmp_path, CARD, state)
    with pytest.raises(BundleError, match="the model's outputs are not finite"):
        Classifier.load(tmp_path, device="cpu").probabilities(random_views(1))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_bundle(tmp_path, replace(CARD, arch="resnet34"), random_weights())
    with pytest.raises(BundleError, match="are not those of a resnet34"):
        Classifier.load(tmp_path, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(LaunchError, match=f"the device '{device}' cannot be used"):
        Classifier.load(folder, device=device)
