"""Grey and colour of more than 8 bits -> 8 bits, by the range that the file states.

The range is that of the type, or a depth that the file states. It is never that of one image's brightest pixel, which
would make the brightness of a thing depend on what is beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

# TIFF 6.0, sections 8 and 19
_BITS, _PHOTOMETRIC, _FORMAT, _MAX_VALUE, _MAX_VALUE_OF_TYPE = 258, 262, 339, 281, 341
_WHITE_IS_ZERO, _SIGNED, _FLOAT = 0, 2, 3
_PNG = b"\x89PNG\r\n\x1a\n"
_NEARLY_BLACK = 16  # of 256: 12 bits in 16


class UnknownRangeError(ValueError):
    """The file does not state which values are black and white."""


def to_eight_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Return a loaded image with 8 bits a channel. `data` is its file.

    Raises:
        UnknownRangeError: the range is not stated, or the pixels contradict it.
    """
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(np.asarray(image), tags, data)
    if max(tags.get(_BITS, (8,))) > 8 or (image.format == "PNG" and data[24] > 8):
        # Pillow keeps the upper 8 of 16 bits
        stated, brightest = _stated_top(tags), int(np.asarray(image.convert("RGB")).max(initial=0))
        if (stated and stated < 65535) or brightest < _NEARLY_BLACK:
            raise UnknownRangeError(
                f"16-bit colour that uses only {f'0 to {stated:g}' if stated else 'a sixteenth'} of its range: "
                "it would be nearly black; convert it to 8 bits"
            )
    return image


def _grey(levels: npt.NDArray[Any], tags: Any, data: bytes) -> Image.Image:
    bits, kind = max(tags.get(_BITS, (16,))), max(tags.get(_FORMAT, (1,)))
    if kind == 1 and levels.dtype == np.int32:
        levels = levels.view(np.uint32)  # Pillow has no unsigned type of 32 bits
    name = f"{bits}-bit {'float' if kind == _FLOAT else 'grey'}"
    top = _stated_top(tags) or _top_of_png(levels, data)
    if top is None and bits > 16:
        raise UnknownRangeError(f"{name} states no range: black and white are not known; convert it to 8 or 16 bits")
    is_stated = top is not None or bits < 16
    top = top or float(2 ** (bits - (kind == _SIGNED)) - 1)
    low, high = float(levels.min(initial=0)), float(levels.max(initial=0))
    if not 0 <= low <= high <= top:  # also NaN
        raise UnknownRangeError(f"{name} has values from {low:g} to {high:g}, its range is 0 to {top:g}")
    if not is_stated and high < (top + 1) / _NEARLY_BLACK:
        raise UnknownRangeError(
            f"{name} with values up to {high:g} states no smaller range (TIFF MaxSampleValue, PNG sBIT): "
            "it would be nearly black; convert it to 8 bits"
        )
    shares = levels.astype(np.float64) / top
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        shares = 1 - shares
    return Image.fromarray((shares * 255).round().astype(np.uint8))


def _stated_top(tags: Any) -> float | None:
    """Return the greatest value that a TIFF states, if it is that of a depth (4095), not of one image's pixels."""
    for tag in (_MAX_VALUE_OF_TYPE, _MAX_VALUE):
        value = tags.get(tag)
        top = float(max(value) if isinstance(value, tuple) else value or 0)
        if top > 0 and np.log2(top + 1).is_integer():
            return top
    return None


def _top_of_png(levels: npt.NDArray[Any], data: bytes) -> float | None:
    """Return the greatest value of a PNG that states how many of its 16 bits are used (sBIT), or None.

    The standard wants such values scaled up to 16 bits. Some cameras do not scale: then lower bits are used.
    """
    if not data.startswith(_PNG):
        return None
    position = len(_PNG)
    while position + 9 <= len(data) and (name := data[position + 4 : position + 8]) != b"IDAT":
        if name == b"sBIT":
            unused = 16 - data[position + 8]
            if not 0 < unused < 16:
                return None
            top = 2 ** (16 - unused) - 1
            is_scaled = int(levels.max(initial=0)) > top or not ((levels & (2**unused - 1)) > 1).any()
            return 65535.0 if is_scaled else float(top)
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return None
