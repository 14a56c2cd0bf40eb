"""Views: the right part of the image at the right size, close to a slow reference."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from wasteddp.data.decoding.centre import CentreView, centre_box, resize
from wasteddp.data.decoding.crop import (
    MEAN_RGB,
    STD_RGB,
    crop_box,
    evaluation_view,
    normalise,
    training_view,
)
from wasteddp.data.decoding.decode import decode_rgb


def photo(width: int, height: int) -> Image.Image:
    """Return a smooth image, so that two good resizing methods agree."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 100 * np.sin(columns / width * a + rows / height * b) for a, b in ((5, 1), (2, 7), (9, 3))]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize(("width", "height"), [(512, 384), (384, 512), (100, 100), (1600, 1200), (40, 30), (16, 900)])
def test_evaluation_sees_the_centre_as_pillow_would(width: int, height: int) -> None:
    image = photo(width, height)
    view = evaluation_view(jpeg(image), image_size_px=64, resize_px=72)
    assert view.shape == (64, 64, 3)
    assert view.dtype == np.uint8
    scale = 72 / min(width, height)
    half = 32 / scale
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    reference = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR, box=box))
    # grey levels; an image smaller than the view is enlarged from a box rounded to whole pixels
    assert np.abs(view.astype(int) - reference).mean() < (4 if min(width, height) > 64 else 10)


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("size", [(512, 384), (1001, 751), (1333, 1001), (2050, 611), (1024, 768)])
def test_a_jpeg_and_the_same_pixels_in_another_format_are_evaluated_alike(size: tuple[int, int], turn: int) -> None:
    cells = np.random.default_rng(0).integers(0, 256, (36, 48, 3), dtype=np.uint8)
    exif, as_jpeg, as_bmp = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = turn
    Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).save(as_jpeg, "JPEG", quality=90, exif=exif)
    Image.fromarray(decode_rgb(as_jpeg.getvalue())).save(as_bmp, "BMP")
    for side in (32, 96):
        views = [
            evaluation_view(file.getvalue(), image_size_px=side, resize_px=round(side * 8 / 7)).astype(int)
            for file in (as_jpeg, as_bmp)
        ]
        difference = np.abs(views[0] - views[1])
        assert difference.mean() < 1.5
        assert difference.max() <= 8


def test_the_central_square_is_in_the_centre_and_on_the_blocks_of_a_reduced_jpeg() -> None:
    for height, width in np.random.default_rng(0).integers(1, 3000, (300, 2)).tolist():
        top, left, side, factor = centre_box(height, width, image_size_px=64, resize_px=73)
        assert {top % factor, left % factor, side % factor} == {0}
        assert 0 <= top <= height - side
        assert 0 <= left <= width - side
        assert abs(top - (height - side) / 2) <= factor
        assert abs(left - (width - side) / 2) <= factor
        assert abs(side - min(height, width) * 64 / 73) <= factor
        assert factor == 1 or side // factor >= 2 * 64


def test_a_training_view_is_the_requested_box() -> None:
    image = photo(512, 384)
    draws = np.array([0.3, 0.6, 0.2, 0.8])
    top, left, height, width = crop_box(384, 512, scale=(0.2, 0.8), ratio=(0.75, 1.33), uniform=draws)
    view = training_view(jpeg(image), image_size_px=64, scale=(0.2, 0.8), ratio=(0.75, 1.33), uniform=draws)
    box = (left, top, left + width, top + height)
    reference = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR, box=box))
    assert np.abs(view.astype(int) - reference).mean() < 4


def test_crops_cover_the_asked_areas_and_stay_inside() -> None:
    generator = np.random.default_rng(0)
    areas = []
    for _ in range(2000):
        box = crop_box(300, 400, scale=(0.1, 0.9), ratio=(0.8, 1.25), uniform=generator.random(4))
        top, left, height, width = box
        assert 0 <= top <= top + height <= 300
        assert 0 <= left <= left + width <= 400
        areas.append(height * width / (300 * 400))
    assert abs(np.mean(areas) - 0.5) < 0.02
    assert min(areas) > 0.09


@pytest.mark.parametrize("size", [(1, 1), (2, 500), (500, 1)])
def test_images_of_few_pixels_make_a_view(size: tuple[int, int]) -> None:
    data = jpeg(Image.new("RGB", size, (200, 100, 50)))
    for view in (
        evaluation_view(data, image_size_px=32, resize_px=36),
        training_view(data, image_size_px=32, scale=(0.1, 1), ratio=(0.5, 2), uniform=np.array([0.0, 0.99, 0.99, 0.5])),
    ):
        assert view.shape == (32, 32, 3)
        assert np.abs(view.astype(int) - [200, 100, 50]).max() < 12


def test_normalise_is_the_formula() -> None:
    import torch

    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = (images.double() / 255 - torch.tensor(MEAN_RGB).view(3, 1, 1)) / torch.tensor(STD_RGB).view(3, 1, 1)
    assert torch.allclose(normalise(images).double(), expected, atol=1e-5)


@pytest.mark.parametrize("side", [1, 7, 31, 32, 33, 64, 100, 385])
def test_the_resize_without_torch_has_the_same_bits(side: int) -> None:
    pixels = np.random.default_rng(side).integers(0, 256, (side + 3, side + 2, 3), dtype=np.uint8)
    rotated = pixels.transpose(1, 0, 2)[1 : side + 1, 2:]  # not contiguous
    image_1CHW = torch.from_numpy(np.ascontiguousarray(rotated)[None]).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image_1CHW, (32, 32), mode="bilinear", antialias=True)
    np.testing.assert_array_equal(resize(rotated, 32), expected[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", [(48, 40), (300, 400), (801, 650)])
@pytest.mark.parametrize(("kind", "how"), [("JPEG", {}), ("JPEG", {"exif": True}), ("PNG", {})])
def test_the_view_without_torch_has_the_same_bits(size: tuple[int, int], kind: str, how: dict[str, bool]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6 if how else 1
    buffer = io.BytesIO()
    photo(*size).save(buffer, kind, exif=exif)
    view = np.empty((32, 32, 3), np.uint8)
    CentreView(36).fill(view, buffer.getvalue(), np.zeros(0))
    np.testing.assert_array_equal(view, evaluation_view(buffer.getvalue(), image_size_px=32, resize_px=36))
