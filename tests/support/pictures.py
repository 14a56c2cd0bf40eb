"""Small JPEGs as bytes, a different image for each seed."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def jpeg(seed: int, *, size: tuple[int, int] = (48, 40), mode: str = "RGB", **save: object) -> bytes:
    """Return a JPEG of soft random patches; `size` is width x height, and each seed gives a different image."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **save)
    return buffer.getvalue()
