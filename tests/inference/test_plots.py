"""A confusion matrix is drawn for any number of classes and any names, without a warning."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from wasteddp.inference.evaluation_files import confusion_png


@pytest.mark.parametrize("num_classes", [2, 6, 17, 40])
def test_a_matrix_is_drawn_with_room_for_its_classes(num_classes: int) -> None:
    confusion = np.random.default_rng(0).integers(0, 500, (num_classes, num_classes))
    png = confusion_png(confusion, [f"class {k}" for k in range(num_classes)], title="test")
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("L"))
        assert image.format == "PNG"
        assert 300 < image.width < 4000
        assert 300 < image.height < 4000
        assert image.width > num_classes * 40, "a cell of fewer than 40 px cannot hold a readable number"
    assert pixels.min() < 50 < 250 < pixels.max()


@pytest.mark.parametrize("name", ["x" * 200, "$unclosed", "塑料", "a\nb", "", "<b>&"])
def test_any_name_can_be_drawn(name: str) -> None:
    confusion_png(np.array([[3, 1], [0, 0]]), [name, "other"], title=f"{name}: 75 %")


def test_a_matrix_without_a_sample_is_drawn() -> None:
    confusion_png(np.zeros((3, 3), np.int64), ["a", "b", "c"], title="nothing")
