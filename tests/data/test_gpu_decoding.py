"""Decoding on the device, as far as a CPU can test it: the same crops of the same samples, and no other change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pictures import jpeg
from torch.utils._python_dispatch import TorchDispatchMode

from wasteddp.data import gpu_decoding
from wasteddp.data.augmentation.augment import Augment
from wasteddp.data.batch import Batch
from wasteddp.data.decoding.crop import TrainingView
from wasteddp.data.decoding.decode import Encoded, decode_rgb
from wasteddp.data.loader import Loader, training_steps
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.errors import SettingsError
from wasteddp.order.plan import TrainPlan
from wasteddp.settings import parse
from wasteddp.training import dataloaders
from wasteddp.training.tracking import pictures as gallery

VIEW = TrainingView(seed=0, scale=(0.3, 1.0), ratio=(0.75, 1.33))
LEFT = dataclasses.replace(VIEW, on_device=True)


def run(shards: Path, view: TrainingView) -> list[Batch]:
    plan = TrainPlan(50, 12, 0, 12)
    with SplitReader(Manifest.load(shards), "train") as reader:
        loader = Loader(reader, view, image_size_px=24, workers=2, replace=True, prefetch=2)
        with loader:
            return list(loader.batches(training_steps(plan, 0, 4, rank=0, world_size=1)))


def test_the_crops_left_to_the_device_are_those_of_the_loader(small_shards: Path) -> None:
    for ours, left in zip(run(small_shards, VIEW), run(small_shards, LEFT), strict=True):
        assert (ours.samples == left.samples).all()
        assert (ours.read_B == left.read_B).all()
        assert torch.equal(ours.labels_B, left.labels_B)
        assert not ours.encoded_B
        assert all(left.encoded_B)  # the small set has only plain JPEGs
        gpu_decoding.fill(left.images_BCHW, left.encoded_B)
        apart = (ours.images_BCHW.int() - left.images_BCHW.int()).abs().float()
        assert apart.mean() < 2, "colour at half resolution is interpolated here, and repeated in the loader"


def test_a_crop_is_the_part_asked_for_resized_with_antialiasing() -> None:
    data, box = jpeg(3, size=(64, 48)), (8, 16, 32, 40)
    images_BCHW = torch.zeros(2, 3, 20, 20, dtype=torch.uint8)
    gpu_decoding.fill(images_BCHW, [None, Encoded(data, box)])
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
    gpu_decoding.fill(expected, encoded)

    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("nvjpegDecode failed: 5")

    monkeypatch.setattr(gpu_decoding, "decode_jpeg", refuses)
    gpu_decoding.fill(images_BCHW, encoded)
    assert images_BCHW.any()
    assert (images_BCHW.int() - expected.int()).abs().max() <= 2  # another build of libjpeg


def test_galleries_show_the_images_that_the_device_decodes(small_shards: Path) -> None:
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
        dataloaders.refuse_device_decoding(settings.data.decode, "cpu")
    dataloaders.refuse_device_decoding(settings.data.decode, "cuda")
    dataloaders.refuse_device_decoding(parse("").data.decode, "cpu")


def photos(count: int, seed: int, *, most_px: int = 90) -> tuple[list[torch.Tensor], np.ndarray]:
    """Return noise, which shows differences in resizing best, with a box in each: pixel, line, part or whole image."""
    rng = np.random.default_rng(seed)
    images, boxes = [], []
    for i in range(count):
        sizes = rng.integers(1, most_px + 1, 2)
        crop = np.array([[1, 1], [1, sizes[1]], [sizes[0], 1], sizes, *[rng.integers(1, sizes + 1)] * 3][i % 7])
        boxes.append([*rng.integers(0, sizes - crop + 1), *crop])
        images.append(torch.from_numpy(rng.integers(0, 256, (3, *sizes), dtype=np.uint8)))
    return images, np.array(boxes, np.int64)


def one_by_one(images: Sequence[torch.Tensor], boxes: np.ndarray, view_px: tuple[int, int]) -> torch.Tensor:
    """Resize each crop with torch's own function."""
    resized = []
    for image, (top, left, height, width) in zip(images, boxes, strict=True):
        crop = image[None, :, top : top + height, left : left + width].float()
        out = torch.nn.functional.interpolate(crop, view_px, mode="bilinear", antialias=True)
        resized.append(out[0].round().clamp(0, 255).to(torch.uint8))
    return torch.stack(resized)


@pytest.mark.parametrize("view_px", [(24, 24), (1, 1), (7, 50), (120, 33)])
@pytest.mark.parametrize("chunk_bytes", [1, 2_000_000, 2**40])
def test_crops_are_resized_together_as_torch_resizes_each(
    view_px: tuple[int, int], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_decoding, "_CHUNK_BYTES", chunk_bytes)
    images, boxes = photos(60, seed=sum(view_px))
    rows = np.random.default_rng(0).permutation(64)[:60].tolist()
    out = torch.full((64, 3, *view_px), 77, dtype=torch.uint8).to(memory_format=torch.channels_last)
    gpu_decoding.resize_crops(out, rows, images, boxes)
    apart = (out[rows].int() - one_by_one(images, boxes, view_px).int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-3, "only values half way between two levels may be rounded differently"
    assert (out[sorted(set(range(64)) - set(rows))] == 77).all()


def test_factors_of_11_bits_are_a_level_apart_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    def tf32(factor: torch.Tensor) -> torch.Tensor:
        """Round to 10 bits after the leading one."""
        return ((factor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda one, other: bmm(tf32(one), tf32(other)))
    images, boxes = photos(200, seed=1, most_px=300)
    out = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    gpu_decoding.resize_crops(out, range(200), images, boxes)
    apart = (out.int() - one_by_one(images, boxes, (32, 32)).int()).abs()
    assert 0 < apart.float().mean() < 0.1
    assert apart.max() == 1


def test_chunks_hold_each_image_once_within_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    crops = rng.integers(1, 800, (300, 2))
    image_bytes = 3 * crops.prod(axis=1) * rng.integers(1, 4, 300)
    monkeypatch.setattr(gpu_decoding, "_CHUNK_BYTES", 64 * 2**20)
    found = list(gpu_decoding.chunks(crops, image_bytes, (224, 224)))
    assert sorted(np.concatenate(found).tolist()) == list(range(300))
    assert 10 < len(found) < 150
    for chunk in found:
        padded = len(chunk) * crops[chunk].max(axis=0).prod()
        assert len(chunk) == 1 or 3 * 9 * padded + image_bytes[chunk].sum() <= 64 * 2**20
    monkeypatch.setattr(gpu_decoding, "_CHUNK_BYTES", 2**60)
    assert len(list(gpu_decoding.chunks(crops, image_bytes, (224, 224)))) == 1


class Kernels(TorchDispatchMode):
    """Counts operations that do not return a view of their argument."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_as_many_operations_are_started_for_many_images_as_for_few() -> None:
    counts = []
    for count in (7, 70):
        images, boxes = photos(count, seed=3)
        out = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
        with Kernels() as kernels:
            gpu_decoding.resize_crops(out, range(count), images, boxes)
        counts.append(kernels.count)
    assert counts[0] == counts[1] < 64
