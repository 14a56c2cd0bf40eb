"""Flips, colour, normalisation and erasing as one CUDA kernel, whose results have the same bits as `Augment` on a CPU.

The kernel reads an image's pixels twice, as bytes (once for their mean), and writes them once. The separate tensor
operations of `Augment` on a CPU need about twenty passes over the batch in float32. The kernel does not fuse
multiplications with additions and does not divide, so each result is rounded as on the CPU.

Legend: B images of a batch, C = 3, H W pixels; channels-last in memory, so `place` is the position in an image's
H W C bytes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import triton
import triton.language as tl

from wasteddp.data.augmentation.augment import LUMA, Augment, Drawn, mean_luma
from wasteddp.data.augmentation.operations import to_device
from wasteddp.data.decoding.crop import MEAN_RGB, STD_RGB, normalising

_BLOCK = 1024  # values of the result that one program instance writes


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    images,  # uint8 [B, H, W, 3]
    results,  # float32 [B, H, W, 3]
    drawn,  # float32 [B, 9], a row a `Drawn.table`
    means,  # float32 [B], of the images' luma; read where HAS_COLOUR
    shift,  # float32 [3]
    factor,  # float32 [3]
    height,
    width,
    HAS_COLOUR: tl.constexpr,
    HAS_ERASING: tl.constexpr,
    RED: tl.constexpr,
    GREEN: tl.constexpr,
    BLUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = height * width * 3
    is_inside = place < size
    channel = place % 3
    row = place // 3 // width
    column = place // 3 % width
    own = drawn + image * 9
    flips_columns, flips_rows = tl.load(own), tl.load(own + 1)
    from_column = tl.where(flips_columns != 0, width - 1 - column, column)
    from_row = tl.where(flips_rows != 0, height - 1 - row, row)
    pixel = images + image.to(tl.int64) * size + (from_row * width + from_column) * 3
    value = tl.load(pixel + channel, mask=is_inside, other=0).to(tl.float32)
    if HAS_COLOUR:
        red = tl.load(pixel, mask=is_inside, other=0).to(tl.float32)
        green = tl.load(pixel + 1, mask=is_inside, other=0).to(tl.float32)
        blue = tl.load(pixel + 2, mask=is_inside, other=0).to(tl.float32)
        grey = red * RED + green * GREEN + blue * BLUE
        offset = grey * tl.load(own + 3) + tl.load(means + image) * tl.load(own + 4)
        value = value * tl.load(own + 2) + offset
        value = tl.minimum(tl.maximum(value, 0.0), 255.0)
    value = (value - tl.load(shift + channel)) * tl.load(factor + channel)
    if HAS_ERASING:
        top, bottom = tl.load(own + 5), tl.load(own + 6)
        left, right = tl.load(own + 7), tl.load(own + 8)
        is_erased = (row >= top) & (row < bottom) & (column >= left) & (column < right)
        value = value * tl.where(is_erased, 0.0, 1.0)  # a product, as on a CPU, since the result may be -0
    tl.store(results + image.to(tl.int64) * size + place, value, mask=is_inside)


def augment(
    images_BCHW: torch.Tensor,
    drawn: Drawn,
    has_colour: bool,
    *,
    mean: tuple[float, float, float] = MEAN_RGB,
    std: tuple[float, float, float] = STD_RGB,
) -> torch.Tensor:
    """Do as `Augment`, except for a policy's operations: uint8 [B, 3, H, W] -> float32, both channels-last."""
    count, _, height, width = images_BCHW.shape
    device = images_BCHW.device
    results_BCHW = torch.empty_like(images_BCHW, dtype=torch.float32)
    shift, factor = normalising(device, mean, std)
    _kernel[(triton.cdiv(height * width * 3, _BLOCK), count)](
        images_BCHW,
        results_BCHW,
        to_device(drawn.table(), device),
        mean_luma(images_BCHW).float() if has_colour else results_BCHW,
        shift,
        factor,
        height,
        width,
        HAS_COLOUR=has_colour,
        HAS_ERASING=bool(drawn.erased_B4.any()),
        RED=LUMA[0],
        GREEN=LUMA[1],
        BLUE=LUMA[2],
        BLOCK=_BLOCK,
        enable_fp_fusion=False,
    )
    return results_BCHW


def difference(device: torch.device) -> str:
    """Describe how the kernel's results differ from the CPU's on images that use all its parts; "" if they do not."""
    every = Augment(0, horizontal_flip=0.5, vertical_flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, erase=0.5)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 40, 56, 3), dtype=np.uint8))
    images_BCHW, samples = pixels.permute(0, 3, 1, 2), np.arange(32)
    expected = every(images_BCHW, samples, 0)
    found = replace(every, kernel=augment)(images_BCHW.to(device), samples, 0).cpu()
    num_other = int((found.view(torch.int32) != expected.view(torch.int32)).sum())
    return f"{num_other:,} of {expected.numel():,} values differ from the CPU's" if num_other else ""
