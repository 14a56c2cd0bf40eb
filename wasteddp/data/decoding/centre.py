"""The central square of an image, as evaluation and prediction see it, without torch.

Legend: H W of the upright image, S the side of the view.

`resize` computes in numpy, bit for bit, what torch's uint8 kernel computes (bilinear, antialiased): first along the
rows, then along the columns, each with weights of 16 bits and rounding. It takes 7 ms for 384 to 224 px on one core,
and torch's kernel 0.7 ms, so `crop.evaluation_view` uses that, and this is for programs that do not load torch.
Source: PyTorch, aten/src/ATen/native/cpu/UpSampleKernel.cpp, compute_index_ranges_int16_weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt

from wasteddp.data.decoding.decode import ImageHWC, decode_rgb, header

_MOST_BITS = 22  # of the weights' precision
_LARGEST_WEIGHT = 1 << 15


def centre_box(height: int, width: int, *, image_size_px: int, resize_px: int) -> tuple[int, int, int, int]:
    """Top, left and side of the central square, and by how much a JPEG is decoded smaller: 1, 2, 4 or 8.

    That is the largest factor with which the square keeps twice the side of the view. Top, left and side are multiples
    of it: with other numbers the view of a JPEG would be shifted against that of the same pixels in another format.
    """
    shorter = min(height, width)
    side = min(shorter, max(1, round(shorter * image_size_px / resize_px)))
    factor = next((f for f in (8, 4, 2) if side >= 2 * f * image_size_px), 1)
    if factor == 1:
        return (height - side) // 2, (width - side) // 2, side, 1
    side = min(round(side / factor), shorter // factor) * factor
    top, left = (
        min(round((whole - side) / 2 / factor), (whole - side) // factor) * factor for whole in (height, width)
    )
    return top, left, side, factor


def decode_centre(data: bytes, *, image_size_px: int, resize_px: int) -> ImageHWC:
    """Decode an image file and return its central square, not resized; a large JPEG is decoded at a fraction.

    Raises:
        UndecodableError: see `decode_rgb`.
    """
    known = header(data)
    top, left, side, factor = centre_box(known.height, known.width, image_size_px=image_size_px, resize_px=resize_px)
    if known.turn != 1 and (known.height % factor or known.width % factor):
        pixels = decode_rgb(data, known=known)  # turned, its blocks would not begin at the top left
    else:
        whole_px = -(-known.height // factor), -(-known.width // factor)
        pixels = decode_rgb(data, known=known, min_height_px=whole_px[0], min_width_px=whole_px[1])
    if pixels.shape[0] != known.height:
        top, left, side = top // factor, left // factor, side // factor
    return pixels[top : top + side, left : left + side]


def cut_centre(pixels: ImageHWC, *, image_size_px: int, resize_px: int) -> ImageHWC:
    """Return the central square of decoded pixels: that of an image file that is not a JPEG."""
    height, width = pixels.shape[:2]
    top, left, side, _ = centre_box(height, width, image_size_px=image_size_px, resize_px=resize_px)
    return pixels[top : top + side, left : left + side]


def resize(pixels: ImageHWC, side_px: int) -> ImageHWC:
    """Resize to uint8 [S, S, 3], with the same bits as torch's kernel."""
    narrow_WHC = _resize_rows(np.ascontiguousarray(pixels.transpose(1, 0, 2)), side_px)
    return _resize_rows(np.ascontiguousarray(narrow_WHC.transpose(1, 0, 2)), side_px)


def _resize_rows(pixels: npt.NDArray[np.uint8], number: int) -> npt.NDArray[np.uint8]:
    """Resize along the first axis."""
    first, weights, bits = _row_weights(len(pixels), number)
    wide = pixels.reshape(len(pixels), -1).astype(np.int32)
    total = np.full((number, wide.shape[1]), 1 << (bits - 1), np.int32)  # a half, for rounding
    for k in range(weights.shape[1]):
        part = wide[np.minimum(first + k, len(pixels) - 1)]
        part *= weights[:, k, None]
        total += part
    total >>= bits
    return total.clip(0, 255).astype(np.uint8).reshape(number, *pixels.shape[1:])


@lru_cache(maxsize=64)
def _row_weights(rows: int, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], int]:
    """Return the first source row of each of `number` rows, the weights of it and the rows after it, and their bits."""
    scale = rows / number
    support = max(scale, 1.0)
    weights = np.zeros((number, ceil(support) * 2 + 1))
    first = np.zeros(number, np.int64)
    for row in range(number):
        centre = scale * (row + 0.5)
        begin = max(int(centre - support + 0.5), 0)
        used = min(int(centre + support + 0.5), rows) - begin
        triangle = (1 - np.abs((np.arange(begin, begin + used) - centre + 0.5) / support)).clip(0)
        first[row], weights[row, :used] = begin, triangle / triangle.sum()
    largest, bits = weights.max(), 0
    while bits < _MOST_BITS and int(0.5 + largest * (1 << (bits + 1))) < _LARGEST_WEIGHT:
        bits += 1
    return first, np.floor(weights * (1 << bits) + 0.5).astype(np.int32), bits


@dataclass(frozen=True, slots=True)
class CentreView:
    """As `crop.EvaluationView`, with the same bits, without torch."""

    resize_px: int

    def draws(self, samples: npt.NDArray[np.int64], epoch: int) -> npt.NDArray[np.float64]:
        return np.zeros((len(samples), 0))

    def fill(self, out: ImageHWC, data: bytes, draws: npt.NDArray[np.float64]) -> None:
        out[:] = resize(decode_centre(data, image_size_px=len(out), resize_px=self.resize_px), len(out))
