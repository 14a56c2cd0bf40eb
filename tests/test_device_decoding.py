"""Decoding on the device, as far as a CPU can try it: the same crops of the same samples, and nothing else changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import jpeg

from wasteddp.data import device_decoding
from wasteddp.data.augment import Augment
from wasteddp.data.batch import Batch
from wasteddp.data.decoding import Encoded, decode_rgb
from wasteddp.data.loader import Loader, training_steps
from wasteddp.data.manifest import Manifest
from wasteddp.data.plan import TrainPlan
from wasteddp.data.reading import SplitReader
from wasteddp.data.views import TrainingView
from wasteddp.errors import SettingsError
from wasteddp.settings import parse
from wasteddp.training import copying, gallery, inputs

VIEW = TrainingView(seed=0, scale=(0.3, 1.0), ratio=(0.75, 1.33))
LEFT = dataclasses.replace(VIEW, on_device=True)


def run(shards: Path, view: TrainingView) -> list[Batch]:
    plan = TrainPlan(50, 12, 0, 12)
    with SplitReader(Manifest.load(shards), "train") as reader:
        loader = Loader(reader, view, image_size_px=24, workers=2, replace=True, prefetch=2)
        with loader:
            return list(loader.batches(training_steps(plan, 0, 4, rank=0, world_size=1)))


def test_what_is_left_to_the_device_are_the_crops_that_the_loader_would_have_made(small_shards: Path) -> None:
    for ours, left in zip(run(small_shards, VIEW), run(small_shards, LEFT), strict=True):
        assert (ours.samples == left.samples).all()
        assert (ours.read_B == left.read_B).all()
        assert torch.equal(ours.labels_B, left.labels_B)
        assert not ours.encoded_B
        assert all(left.encoded_B)  # the small set is of plain JPEGs only
        device_decoding.fill(left.images_BCHW, left.encoded_B)
        apart = (ours.images_BCHW.int() - left.images_BCHW.int()).abs().float()
        assert apart.mean() < 2, "colour at half resolution is interpolated here, and repeated in the loader"


def test_a_crop_is_the_part_asked_for_resized_with_antialiasing() -> None:
    data, box = jpeg(3, size=(64, 48)), (8, 16, 32, 40)
    images_BCHW = torch.zeros(2, 3, 20, 20, dtype=torch.uint8)
    device_decoding.fill(images_BCHW, [None, Encoded(data, box)])
    assert not images_BCHW[0].any(), "a row that is not left to the device stays as it is"
    crop = torch.from_numpy(decode_rgb(data)[8:40, 16:56].copy()).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(crop, (20, 20), mode="bilinear", antialias=True)[0]
    assert (images_BCHW[1].float() - expected).abs().max() <= 2  # another build of libjpeg


@pytest.mark.parametrize("how", [{"mode": "L"}, {"mode": "CMYK"}])
def test_only_plain_jpegs_are_left(how: dict[str, str]) -> None:
    view, out = LEFT, np.zeros((24, 24, 3), np.uint8)
    left = view.fill(out, jpeg(1, **how), view.draws(np.array([5]), 0)[0])  # type: ignore[arg-type]
    assert bool(left) == (how["mode"] == "L")
    assert out.any() != bool(left)


def test_what_the_decoder_of_the_device_refuses_is_decoded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = [Encoded(jpeg(seed, size=(64, 48)), (8, 16, 32, 40)) for seed in (1, 2)]
    expected, images_BCHW = (torch.zeros(2, 3, 20, 20, dtype=torch.uint8) for _ in range(2))
    device_decoding.fill(expected, encoded)

    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("nvjpegDecode failed: 5")

    monkeypatch.setattr(device_decoding, "decode_jpeg", refuses)
    device_decoding.fill(images_BCHW, encoded)
    assert images_BCHW.any()
    assert (images_BCHW.int() - expected.int()).abs().max() <= 2  # another build of libjpeg


def test_the_pictures_of_what_the_network_sees_are_of_decoded_images(small_shards: Path) -> None:
    manifest, plan = Manifest.load(small_shards), TrainPlan(50, 12, 0, 12)
    shown = []
    with SplitReader(manifest, "train") as reader:
        for view in (VIEW, LEFT):
            with Loader(reader, view, image_size_px=24, workers=2, replace=True, prefetch=2) as loader:
                data = SimpleNamespace(plan=plan, manifest=manifest, train_loader=loader)
                pictures = gallery.augmented(data, Augment(0), 8).pictures  # type: ignore[arg-type]
                shown.append(np.stack([decode_rgb(picture.jpeg) for picture in pictures]).astype(int))
    assert np.abs(shown[0] - shown[1]).mean() < 4


def test_without_a_gpu_it_is_refused() -> None:
    settings = parse("", ["data.decode=gpu"])
    with pytest.raises(SettingsError, match=r"data\.decode is gpu and this process computes on cpu"):
        inputs.refuse_device_decoding(settings, "cpu")
    inputs.refuse_device_decoding(settings, "cuda")
    inputs.refuse_device_decoding(parse(""), "cpu")


@pytest.mark.gpu
def test_a_gpu_gets_whole_batches(small_shards: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    left = copying.copied_ahead(iter(run(small_shards, LEFT)), device)
    for ours, decoded in zip(run(small_shards, VIEW), left, strict=True):
        assert not decoded.encoded_B
        assert (ours.images_BCHW.int() - decoded.images_BCHW.cpu().int()).abs().float().mean() < 4
