"""Views: the right part of the image at the right size, close to a slow reference."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from wasteddp.data.decoding.crop import MEAN_RGB, STD_RGB, crop_box, evaluation_view, normalise, training_view


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


def test_training_view_is_the_box_that_it_was_told() -> None:
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
