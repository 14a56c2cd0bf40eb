"""The two views of an image: a random crop for training and the centre for evaluation, both uint8 and square.

Legend: H W of the upright image, S the side of the view, B images in a batch, C = 3.

Both views decode only the pixels that they need (JPEG DCT scaling) and resize with antialiasing in torch's uint8
kernel: 200 us for 512x384 to 224, compared with 730 us in Pillow. The device normalises, since uint8 has a quarter of
the bytes. If `out` is given, it is filled and returned, so that a loader writes its batch only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, log, sqrt
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from wasteddp.data.decoding.centre import cut_centre, decode_centre
from wasteddp.data.decoding.decode import Encoded, Header, ImageHWC, decode_rgb, header, is_plain_jpeg
from wasteddp.order.keyed_random import CROP, I64, uniform

# Source: ImageNet statistics, torchvision.transforms._presets.ImageClassification
MEAN_RGB = (0.485, 0.456, 0.406)
STD_RGB = (0.229, 0.224, 0.225)

# `interpolate` returns planes, and converting them to pixels took as long as the resize (170 us). This is the operator
# that it calls, with an output argument.
_RESIZE_OUT = torch.ops.aten._upsample_bilinear2d_aa.out

Box = tuple[int, int, int, int]  # top, left, height, width, px
Draws = npt.NDArray[np.float64]


def training_view(
    data: bytes,
    *,
    image_size_px: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    uniform: npt.NDArray[np.float64],
    out: ImageHWC | None = None,
) -> ImageHWC:
    """Return a crop of random area and aspect ratio, resized to uint8 [S, S, 3].

    Args:
        data: the image file.
        image_size_px: S.
        scale: smallest and largest fraction of the image's area.
        ratio: smallest and largest width / height.
        uniform: four numbers in [0, 1): area, ratio, top, left. The crop depends on them and the image's size only.
        out: see the module.

    Raises:
        UndecodableError: see `decode_rgb`.
    """
    known = header(data)
    box = crop_box(known.height, known.width, scale=scale, ratio=ratio, uniform=uniform)
    return _crop_resize(data, known, box, image_size_px, out)


def evaluation_view(data: bytes, *, image_size_px: int, resize_px: int, out: ImageHWC | None = None) -> ImageHWC:
    """Resize the shorter side to `resize_px` and return the central square: uint8 [S, S, 3].

    This is computed as one crop of the original and one resize, so pixels outside the crop are not resized. A large
    JPEG is decoded at a fraction of its size. All formats get the box that this needs (docs/inputs.md), so that their
    views differ by a few levels at most.

    Raises:
        UndecodableError: see `decode_rgb`.
    """
    square = decode_centre(data, image_size_px=image_size_px, resize_px=resize_px)
    return _resize(square, image_size_px, out)


def pixel_view(pixels: ImageHWC, *, image_size_px: int, resize_px: int) -> ImageHWC:
    """Return the `evaluation_view` of decoded pixels, uint8 [H, W, 3]: that of a file that is not a JPEG."""
    square = cut_centre(pixels, image_size_px=image_size_px, resize_px=resize_px)
    return _resize(np.ascontiguousarray(square), image_size_px, None)


def crop_box(
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    uniform: npt.NDArray[np.float64],
) -> Box:
    """Return the box of a random crop: its area is uniform in `scale`, the log of width / height uniform in `ratio`.

    torchvision's RandomResizedCrop draws up to ten times until a crop fits, and then uses the centre. Here the first
    crop is trimmed to the image, so the cost and the number of random numbers are fixed.
    Source: Szegedy et al. 2015 (Inception).
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * float(uniform[0]))
    aspect = exp(log(ratio[0]) + (log(ratio[1]) - log(ratio[0])) * float(uniform[1]))
    crop_height = min(height, max(1, round(sqrt(area / aspect))))
    crop_width = min(width, max(1, round(sqrt(area * aspect))))
    top = int((height - crop_height + 1) * float(uniform[2]))
    left = int((width - crop_width + 1) * float(uniform[3]))
    return top, left, crop_height, crop_width


def _crop_resize(data: bytes, known: Header, box: Box, image_size_px: int, out: ImageHWC | None) -> ImageHWC:
    """Decode, crop `box` (in pixels of the full upright image) and resize it to uint8 [S, S, 3].

    A JPEG is decoded at the smallest DCT scale at which the crop still has S pixels on each side.
    """
    height, width, _ = known
    top, left, crop_height, crop_width = box
    pixels = decode_rgb(
        data,
        known=known,
        min_height_px=min(height, ceil(height * image_size_px / crop_height)),
        min_width_px=min(width, ceil(width * image_size_px / crop_width)),
        # colour at half resolution is repeated, not interpolated: 40 of 360 us less, and training sees no difference
        is_fast=True,
    )
    vertical, horizontal = pixels.shape[0] / height, pixels.shape[1] / width  # 1, or the DCT scale
    rows = slice(round(top * vertical), max(round((top + crop_height) * vertical), round(top * vertical) + 1))
    columns = slice(
        round(left * horizontal), max(round((left + crop_width) * horizontal), round(left * horizontal) + 1)
    )
    return _resize(pixels[rows, columns], image_size_px, out)


def _resize(pixels: ImageHWC, image_size_px: int, out: ImageHWC | None) -> ImageHWC:
    if out is None:
        out = np.empty((image_size_px, image_size_px, 3), np.uint8)
    # False: corners are not aligned; None: the scale follows from the sizes
    _RESIZE_OUT(_as_1CHW(pixels), (image_size_px, image_size_px), False, None, None, out=_as_1CHW(out))
    return out


def _as_1CHW(pixels: ImageHWC) -> torch.Tensor:
    """[H, W, C] -> [1, C, H, W] as a view: the fast uint8 kernel needs channels-last memory."""
    return torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def normalising(
    device: torch.device, mean: Sequence[float] = MEAN_RGB, std: Sequence[float] = STD_RGB
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return shift and factor for pixels in 0..255, [1, 3, 1, 1]; cached, since creating them waits for the device."""
    shift, factor = [255.0 * m for m in mean], [1.0 / (255.0 * s) for s in std]
    return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (shift, factor))  # type: ignore[return-value]


def normalise(
    images_BCHW: torch.Tensor,
    mean: tuple[float, float, float] = MEAN_RGB,
    std: tuple[float, float, float] = STD_RGB,
) -> torch.Tensor:
    """Return (x / 255 - mean) / std, which has about zero mean and unit variance: uint8 [B, 3, H, W] -> float32."""
    shift, factor = normalising(images_BCHW.device, mean, std)
    return (images_BCHW.float() - shift) * factor


class View(Protocol):
    """Converts the bytes of a sample to an image of a batch."""

    def draws(self, samples: I64, epoch: int) -> Draws:
        """Return the random numbers of each sample, [B, any]. Pass many samples: a call costs 60 us in numpy."""

    def fill(self, out: ImageHWC, data: bytes, draws: Draws) -> Encoded | None:
        """Write the view of one sample into `out`, or return the encoded image for the device to decode.

        Args:
            out: uint8 [S, S, C].
            data: the bytes of the sample.
            draws: its row of `draws`.

        Raises:
            UndecodableError: see `decode_rgb`.
        """


@dataclass(frozen=True, slots=True)
class TrainingView:
    """Random crops, each a function of (seed, epoch, sample)."""

    seed: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    on_device: bool = False  # leave plain JPEGs to the device

    def draws(self, samples: I64, epoch: int) -> Draws:
        return uniform(CROP, self.seed, epoch, samples, num=4)

    def fill(self, out: ImageHWC, data: bytes, draws: Draws) -> Encoded | None:
        if self.on_device and is_plain_jpeg(data):
            height, width, _ = header(data)
            return Encoded(data, crop_box(height, width, scale=self.scale, ratio=self.ratio, uniform=draws))
        training_view(data, image_size_px=len(out), scale=self.scale, ratio=self.ratio, uniform=draws, out=out)
        return None


@dataclass(frozen=True, slots=True)
class EvaluationView:
    """The centre of the image, without random choices."""

    resize_px: int

    def draws(self, samples: I64, epoch: int) -> Draws:
        return np.zeros((len(samples), 0))

    def fill(self, out: ImageHWC, data: bytes, draws: Draws) -> None:
        evaluation_view(data, image_size_px=len(out), resize_px=self.resize_px, out=out)
