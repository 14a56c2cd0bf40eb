"""The operations of an augmentation policy: geometric moves, blends and lookup tables, each for many images together.

Legend: B images of a group, C = 3, H W pixels.

The arithmetic uses integers, or floats with one rounding at a time, so that the bits are the same on CPU and GPU and
for any number of threads. (`grid_sample`, convolutions and means of floats differ in their last bits.)
Results equal torchvision's within one of 256 levels, since torchvision uses floats where integers are used here. One
difference is intended: if a moved pixel is partly outside the image, its colour and the fill colour are blended by
their areas; torchvision 0.29 applies the inner area twice.
Sources: torchvision.transforms.v2.functional and, for the blends, PIL.ImageEnhance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wasteddp.data.augmentation.randaugment import F64, Operation
from wasteddp.data.decoding.crop import MEAN_RGB
from wasteddp.order.keyed_random import I64

# The colour outside of the image: the mean colour, as for erased rectangles. torchvision's default is black, which is
# far from the usual values after normalisation.
FILL_RGB = tuple(round(255 * mean) for mean in MEAN_RGB)
# Coordinates have 11 bits after the binary point. 255 * 2^11 * 2^11 is the largest such product that fits into 32 bits,
# and two roundings to 1/2048 px change the sharpest edge by at most an eighth of a level.
_POINT = 11
_ONE = 1 << _POINT
# Source: torchvision.transforms.v2.functional.rgb_to_grayscale, in ten-thousandths; their sum is 9999 there too
_LUMA = (2989, 5870, 1140)


def apply(images_BCHW: torch.Tensor, operations_B: I64, magnitudes_B: F64) -> torch.Tensor:
    """Apply one operation to each image: uint8 [B, 3, H, W] -> the same shape and type.

    The images are sorted by operation, so that each operation works on one slice. The host knows the slices, so it does
    not wait for the device.

    Args:
        images_BCHW: on any device.
        operations_B: numbers of `Operation`.
        magnitudes_B: in the units that `Operation` gives; ignored for operations without a magnitude.
    """
    device = images_BCHW.device
    order_B = np.argsort(operations_B, kind="stable")
    operations_B, magnitudes_B = operations_B[order_B], magnitudes_B[order_B]
    sorted_BCHW = images_BCHW.index_select(0, to_device(order_B, device))
    parts = []
    for first, last, change in _CHANGES:
        here = slice(*np.searchsorted(operations_B, (first, last + 1)))
        if here.stop > here.start:
            parts.append(change(sorted_BCHW[here], operations_B[here], magnitudes_B[here]))
    return torch.cat(parts).index_select(0, to_device(np.argsort(order_B), device))


def column(values_B: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Copy one number for each image to the device: [B] -> [B, 1, 1, 1]."""
    return to_device(values_B, device).view(-1, 1, 1, 1)


# --- moves ------------------------------------------------------------------------------------------------------------


def _move(images_BCHW: torch.Tensor, operations_B: I64, magnitudes_B: F64) -> torch.Tensor:
    """Shear, translate and rotate, bilinearly: nearest, torchvision's default, leaves steps at every edge."""
    count, channels, height, width = images_BCHW.shape
    device = images_BCHW.device
    columns_B2W, rows_B2H = (to_device(part, device) for part in _sources(operations_B, magnitudes_B, height, width))
    # coordinates in the frame, which begins one pixel before the image
    x_BHW, y_BHW = (
        (columns_B2W[:, i, None, :] + rows_B2H[:, i, :, None]).clamp_(-_ONE, size * _ONE).add_(_ONE)
        for i, size in enumerate((width, height))
    )
    stride = width + 3
    corners_B1N = (y_BHW >> _POINT).mul_(stride).add_(x_BHW >> _POINT).view(count, 1, -1).long()
    corners_BCN = corners_B1N.expand(-1, channels, -1)
    right_B1N, down_B1N = (part.bitwise_and_(_ONE - 1).view(count, 1, -1) for part in (x_BHW, y_BHW))
    frames_BCM = _add_frame(images_BCHW).flatten(2)
    # the same indices in a shifted frame are the neighbours to the right, below, and below right
    upper_BCN, lower_BCN = (
        _interpolate(right_B1N, *(frames_BCM[:, :, row + shift :].gather(2, corners_BCN) for shift in (0, 1)))
        for row in (0, stride)
    )
    levels_BCN = _interpolate(down_B1N, upper_BCN, lower_BCN).add_(_ONE * _ONE // 2).bitwise_right_shift_(2 * _POINT)
    return levels_BCN.to(torch.uint8).view(images_BCHW.shape)


def _add_frame(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Add a frame of the fill colour, one pixel before and two after the image: int32 [B, C, H + 3, W + 3]."""
    count, channels, height, width = images_BCHW.shape
    frames_BCHW = images_BCHW.new_empty((count, channels, height + 3, width + 3), dtype=torch.int32)
    for channel, level in enumerate(FILL_RGB):
        frames_BCHW[:, channel] = level
    frames_BCHW[:, :, 1:-2, 1:-2] = images_BCHW
    return frames_BCHW


def _interpolate(part: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Interpolate, and return 2048 times the value at `part` / 2048 from `first` to `second`; overwrites `second`."""
    return second.sub_(first).mul_(part).add_(first, alpha=_ONE)


def _sources(
    operations_B: I64, magnitudes_B: F64, height: int, width: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the source of each pixel, in 1/2048 px: (columns [B, 2, W], rows [B, 2, H]).

    The pixel in column i and row j comes from x, y = columns[:, i] + rows[:, j]. Every affine map is such a sum. The
    host computes the terms in float64, so the device only adds integers.
    Source: torchvision.transforms.functional._get_inverse_affine_matrix, written out for single operations.
    """

    def only(operation: Operation) -> F64:
        return np.where(operations_B == operation, magnitudes_B, 0.0)[:, None]

    angle = np.radians(only(Operation.ROTATE))
    sin, cos = np.sin(angle), np.cos(angle)
    is_turned = operations_B[:, None] == Operation.ROTATE
    # the fixed point of a rotation is the centre, that of a shear the corner of the first pixel
    centre_x, centre_y = np.where(is_turned, (width - 1) / 2, -0.5), np.where(is_turned, (height - 1) / 2, -0.5)
    x, y = np.arange(width) - centre_x, np.arange(height) - centre_y
    shift_x, shift_y = np.trunc(only(Operation.TRANSLATE_X)), np.trunc(only(Operation.TRANSLATE_Y))
    columns = (cos * x + centre_x - shift_x, (sin + only(Operation.SHEAR_Y)) * x)
    rows = ((only(Operation.SHEAR_X) - sin) * y, cos * y + centre_y - shift_y)
    columns_B2W, rows_B2H = (np.rint(np.stack(part, 1) * _ONE).astype(np.int32) for part in (columns, rows))
    return columns_B2W, rows_B2H


# --- blends: away from or towards an image without colour, contrast, sharpness or light -------------------------------


def _blend(images_BCHW: torch.Tensor, lacking: torch.Tensor, magnitudes_B: F64) -> torch.Tensor:
    """Return image + magnitude * (image - lacking), clamped and rounded down.

    These are three tensor operations, since a fused multiply-add rounds differently, and not every device has it.
    Source: PIL.ImageEnhance, whose factor is 1 + magnitude.
    """
    pixels_BCHW = images_BCHW.float()
    magnitudes_B111 = column(magnitudes_B.astype(np.float32), images_BCHW.device)
    changes_BCHW = (pixels_BCHW - lacking).mul_(magnitudes_B111)
    return changes_BCHW.add_(pixels_BCHW).clamp_(0, 255).to(torch.uint8)


def _brightness(images_BCHW: torch.Tensor, _: I64, magnitudes_B: F64) -> torch.Tensor:
    return _blend(images_BCHW, torch.zeros((), device=images_BCHW.device), magnitudes_B)


def _color(images_BCHW: torch.Tensor, _: I64, magnitudes_B: F64) -> torch.Tensor:
    return _blend(images_BCHW, _grey(images_BCHW), magnitudes_B)


def _contrast(images_BCHW: torch.Tensor, _: I64, magnitudes_B: F64) -> torch.Tensor:
    grey_B1HW = _grey(images_BCHW)
    # a sum of integers does not depend on the order; multiplied by 1 / pixels, since not every device divides exactly
    means_B111 = grey_B1HW.sum((1, 2, 3), keepdim=True).double() * (1 / (grey_B1HW.shape[2] * grey_B1HW.shape[3]))
    return _blend(images_BCHW, means_B111.float(), magnitudes_B)


def _sharpness(images_BCHW: torch.Tensor, _: I64, magnitudes_B: F64) -> torch.Tensor:
    """Blend with a smooth image: the mean of 3x3 pixels, in which the centre has weight 5; the border is unchanged."""
    smooth_BCHW = images_BCHW.short()
    three_BCHW = smooth_BCHW[:, :, :-2] + smooth_BCHW[:, :, 1:-1] + smooth_BCHW[:, :, 2:]
    sums_BCHW = three_BCHW[..., :-2] + three_BCHW[..., 1:-1] + three_BCHW[..., 2:] + 4 * smooth_BCHW[..., 1:-1, 1:-1]
    smooth_BCHW[..., 1:-1, 1:-1] = (2 * sums_BCHW + 13) // 26  # sums / 13 to the nearest
    return _blend(images_BCHW, smooth_BCHW, magnitudes_B)


def _grey(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the luma, rounded down: int32 [B, 1, H, W]."""
    red_B1HW, green_B1HW, blue_B1HW = torch.split(images_BCHW.int(), 1, dim=1)
    return (red_B1HW * _LUMA[0] + green_B1HW * _LUMA[1] + blue_B1HW * _LUMA[2]) // 10_000


# --- lookup tables: a new level for each level ------------------------------------------------------------------------


def _look_up(images_BCHW: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Replace each level by its entry in `tables`: [B, C or 1, 256]."""
    levels_BCN = images_BCHW.flatten(2).long()
    tables_BCL = tables.to(torch.uint8).expand(-1, images_BCHW.shape[1], -1)
    return tables_BCL.gather(2, levels_BCN).view(images_BCHW.shape)


def _posterize(images_BCHW: torch.Tensor, _: I64, magnitudes_B: F64) -> torch.Tensor:
    masks_B = (0xFF00 >> magnitudes_B.astype(np.int64) & 0xFF).astype(np.uint8)
    return images_BCHW & column(masks_B, images_BCHW.device)


def _solarize(images_BCHW: torch.Tensor, _: I64, magnitudes_B: F64) -> torch.Tensor:
    # the first integer level that reaches the threshold, so that integers are compared
    firsts_B = np.ceil(magnitudes_B).astype(np.int16)
    return torch.where(images_BCHW >= column(firsts_B, images_BCHW.device), 255 - images_BCHW, images_BCHW)


def _autocontrast(images_BCHW: torch.Tensor, _: I64, __: F64) -> torch.Tensor:
    """Stretch each channel from its darkest and lightest level to 0 and 255; a channel of one level is unchanged."""
    lows_BC1, highs_BC1 = (extreme.int() for extreme in _extremes(images_BCHW))
    levels_L = torch.arange(256, dtype=torch.int32, device=images_BCHW.device)
    spans_BC1 = highs_BC1 - lows_BC1
    tables_BCL = ((levels_L - lows_BC1) * 255 // spans_BC1.clamp(min=1)).clamp_(0, 255)
    return _look_up(images_BCHW, torch.where(spans_BC1 > 0, tables_BCL, levels_L))


def _equalize(images_BCHW: torch.Tensor, _: I64, __: F64) -> torch.Tensor:
    """Spread each channel's levels so that all are about equally frequent, rounded as in PIL.ImageOps.equalize."""
    levels_BCN = images_BCHW.flatten(2).long()
    one = torch.ones((), dtype=torch.int64, device=images_BCHW.device)
    counts_BCL = torch.zeros((*levels_BCN.shape[:2], 256), dtype=torch.int64, device=images_BCHW.device)
    counts_BCL.scatter_add_(2, levels_BCN, one.expand_as(levels_BCN))
    lightest_BC1 = counts_BCL.gather(2, _extremes(images_BCHW)[1].long())
    steps_BC1 = (levels_BCN.shape[2] - lightest_BC1) // 255
    below_BCL = counts_BCL.cumsum(2) - counts_BCL
    tables_BCL = ((below_BCL + steps_BC1 // 2) // steps_BC1.clamp(min=1)).clamp_(0, 255)
    # a channel with too few pixels is unchanged
    return _look_up(images_BCHW, torch.where(steps_BC1 > 0, tables_BCL, torch.arange(256, device=one.device)))


def _extremes(images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the darkest and the lightest level of each channel, [B, C, 1]."""
    lows_BC1, highs_BC1 = torch.aminmax(images_BCHW.flatten(2), dim=2, keepdim=True)
    return lows_BC1, highs_BC1


_Change = Callable[[torch.Tensor, I64, F64], torch.Tensor]
# first and last operation, in the enum's order
_CHANGES: tuple[tuple[Operation, Operation, _Change], ...] = (
    (Operation.IDENTITY, Operation.IDENTITY, lambda images_BCHW, _, __: images_BCHW),
    (Operation.SHEAR_X, Operation.ROTATE, _move),
    (Operation.BRIGHTNESS, Operation.BRIGHTNESS, _brightness),
    (Operation.COLOR, Operation.COLOR, _color),
    (Operation.CONTRAST, Operation.CONTRAST, _contrast),
    (Operation.SHARPNESS, Operation.SHARPNESS, _sharpness),
    (Operation.POSTERIZE, Operation.POSTERIZE, _posterize),
    (Operation.SOLARIZE, Operation.SOLARIZE, _solarize),
    (Operation.AUTOCONTRAST, Operation.AUTOCONTRAST, _autocontrast),
    (Operation.EQUALIZE, Operation.EQUALIZE, _equalize),
)


def to_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return the array as a tensor on the device; on the CPU it is a view.

    The copy uses page-locked memory: a copy from other memory may wait for all earlier work of the CUDA stream.
    """
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
