"""Small JPEGs as bytes, each seed another picture."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def jpeg(seed: int, *, size: tuple[int, int] = (48, 40), mode: str = "RGB", **save: object) -> bytes:
    """A JPEG of soft random patches: every seed another picture, width x height as `size`."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **save)
    return buffer.getvalue()
