"""RGB pixels -> JPEG bytes, for what cannot go into a shard as it is. The same pixels give the same bytes."""

from __future__ import annotations

import numpy as np
import simplejpeg
from PIL import Image

from wasteddp.data.decoding.decode import ImageHWC, decode_rgb, size_px

DEFAULT_QUALITY = 95


def encode_jpeg(pixels_HWC: ImageHWC, *, quality: int) -> bytes:
    """Full colour resolution (4:4:4): chroma subsampling would blur the edges of small coloured things."""
    encoded: bytes = simplejpeg.encode_jpeg(pixels_HWC, quality=quality, colorspace="RGB", colorsubsampling="444")
    return encoded


def reencode(data: bytes, *, max_side_px: int | None, quality: int) -> bytes:
    """Any image as an upright RGB JPEG, no side longer than `max_side_px`; smaller images are never enlarged.

    Raises:
        UndecodableError: the bytes are no image that can be decoded.
    """
    height, width = size_px(data)
    scale = min(1.0, (max_side_px or height + width) / max(height, width))
    target_height, target_width = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = decode_rgb(data, min_height_px=target_height, min_width_px=target_width)
    if pixels.shape[:2] != (target_height, target_width):
        shrunk = Image.fromarray(pixels).resize((target_width, target_height), Image.Resampling.LANCZOS)
        pixels = np.asarray(shrunk)
    return encode_jpeg(np.ascontiguousarray(pixels), quality=quality)
