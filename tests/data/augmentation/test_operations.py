"""Each operation of a policy equals torchvision's, and has the same bits for any batch and number of threads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode, functional

from wasteddp.data.augmentation.operations import FILL_RGB, apply
from wasteddp.data.augmentation.randaugment import F64, Operation

# Magnitudes of both policies: the ends, zero and values in between.
SHEARS = (-0.99, -0.3, 0.0, 0.1, 0.99)
SHIFTS = (-32.0, -7.9, 0.0, 3.2, 32.0)
BLENDS = (-0.99, -0.5, 0.0, 0.033, 0.9, 0.99)
MAGNITUDES = {
    Operation.IDENTITY: (0.0,),
    Operation.SHEAR_X: SHEARS,
    Operation.SHEAR_Y: SHEARS,
    Operation.TRANSLATE_X: SHIFTS,
    Operation.TRANSLATE_Y: SHIFTS,
    Operation.ROTATE: (-135.0, -30.0, 0.0, 4.5, 90.0, 135.0),
    Operation.BRIGHTNESS: BLENDS,
    Operation.COLOR: BLENDS,
    Operation.CONTRAST: BLENDS,
    Operation.SHARPNESS: BLENDS,
    Operation.POSTERIZE: (2.0, 4.0, 7.0, 8.0),
    Operation.SOLARIZE: (0.0, 84.15, 128.0, 255.0),
    Operation.AUTOCONTRAST: (0.0,),
    Operation.EQUALIZE: (0.0,),
}
# The other operations differ by one level in some pixels: torchvision uses floats instead of integers, or another
# order, and rounds a half to the even level.
EXACT = {
    Operation.IDENTITY,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
    Operation.POSTERIZE,
    Operation.SOLARIZE,
    Operation.EQUALIZE,
}


def pictures(height: int, width: int) -> torch.Tensor:
    """Return noise, a smooth image of few levels, a light, a dark and a single-colour image: uint8 [5, 3, H, W]."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1, 3, height, width))
    slopes = np.linspace(60, 140, height)[:, None] + np.linspace(0, 30, width) + np.arange(3)[:, None, None] * 20
    light, dark = rng.integers(200, 256, noise.shape), rng.integers(0, 40, noise.shape)
    plain = np.broadcast_to(np.array([0, 90, 255])[:, None, None], noise.shape[1:])
    return torch.from_numpy(np.concatenate([noise, slopes[None], light, dark, plain[None]]).astype(np.uint8))


def moved_by_torchvision(images_BCHW: torch.Tensor, operation: Operation, magnitude: float) -> torch.Tensor:
    """Move with torchvision: pixels from outside are zero, and the result is not rounded."""
    degrees, shift, bilinear = math.degrees(math.atan(magnitude)), int(magnitude), InterpolationMode.BILINEAR
    if operation == Operation.ROTATE:
        return functional.rotate(images_BCHW, magnitude, interpolation=bilinear)
    translate, shear, center = {
        Operation.SHEAR_X: ([0, 0], [degrees, 0.0], [0.0, 0.0]),
        Operation.SHEAR_Y: ([0, 0], [0.0, degrees], [0.0, 0.0]),
        Operation.TRANSLATE_X: ([shift, 0], [0.0, 0.0], None),
        Operation.TRANSLATE_Y: ([0, shift], [0.0, 0.0], None),
    }[operation]
    return functional.affine(images_BCHW, 0.0, translate, 1.0, shear, interpolation=bilinear, center=center)


def torchvisions(images_BCHW: torch.Tensor, operation: Operation, magnitude: float) -> torch.Tensor:
    """Apply an operation as torchvision's RandAugment and TrivialAugmentWide do."""
    if Operation.SHEAR_X <= operation <= Operation.ROTATE:
        # The fill colour is blended here, since torchvision (0.29) applies the area of a partly outside pixel twice.
        fill_C11 = torch.tensor(FILL_RGB, dtype=torch.float32).view(3, 1, 1)
        inside_B1HW = moved_by_torchvision(torch.ones(images_BCHW[:, :1].shape), operation, magnitude)
        moved_BCHW = moved_by_torchvision(images_BCHW.float(), operation, magnitude)
        return (moved_BCHW + (1 - inside_B1HW) * fill_C11).round()
    match operation:
        case Operation.BRIGHTNESS:
            return functional.adjust_brightness(images_BCHW, 1 + magnitude)
        case Operation.COLOR:
            return functional.adjust_saturation(images_BCHW, 1 + magnitude)
        case Operation.CONTRAST:
            return functional.adjust_contrast(images_BCHW, 1 + magnitude)
        case Operation.SHARPNESS:
            return functional.adjust_sharpness(images_BCHW, 1 + magnitude)
        case Operation.POSTERIZE:
            return functional.posterize(images_BCHW, int(magnitude))
        case Operation.SOLARIZE:
            return functional.solarize(images_BCHW, magnitude)
        case Operation.AUTOCONTRAST:
            return functional.autocontrast(images_BCHW)
        case Operation.EQUALIZE:
            return functional.equalize(images_BCHW)
    return images_BCHW


def every_operation(images: int) -> tuple[np.ndarray, F64]:
    """Return all operations and magnitudes in turn, for this many images."""
    pairs = [(operation, magnitude) for operation, values in MAGNITUDES.items() for magnitude in values]
    operations, magnitudes = np.array([pairs[i % len(pairs)] for i in range(images)]).T
    return operations.astype(np.int64), magnitudes


@pytest.mark.parametrize("size", [(33, 48), (32, 32)])
@pytest.mark.parametrize("operation", Operation)
def test_it_is_torchvisions_operation(operation: Operation, size: tuple[int, int]) -> None:
    images = pictures(*size)
    for magnitude in MAGNITUDES[operation]:
        found = apply(images, np.full(5, operation), np.full(5, magnitude))
        expected = torchvisions(images, operation, magnitude)
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= (0 if operation in EXACT else 1), magnitude
        assert difference.float().mean() < 0.1, magnitude


@pytest.mark.parametrize("operation", [o for o in Operation if 0.0 in MAGNITUDES[o] and o != Operation.SOLARIZE][:10])
def test_a_magnitude_of_zero_changes_no_bit(operation: Operation) -> None:
    images = pictures(20, 24)
    assert torch.equal(apply(images, np.full(5, operation), np.zeros(5)), images)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 1)])
def test_the_smallest_images_have_every_operation(size: tuple[int, int]) -> None:
    operations, magnitudes = every_operation(60)
    images = pictures(*size).repeat(12, 1, 1, 1)
    assert apply(images, operations, magnitudes).shape == images.shape


def test_an_image_is_changed_alike_whatever_else_is_in_the_batch() -> None:
    images, (operations, magnitudes) = pictures(20, 24).repeat(12, 1, 1, 1), every_operation(60)
    together = apply(images, operations, magnitudes)
    order = np.random.default_rng(1).permutation(60)
    assert torch.equal(apply(images[order], operations[order], magnitudes[order]), together[order])
    for part in (slice(0, 7), slice(7, 8), slice(8, 60)):
        assert torch.equal(apply(images[part], operations[part], magnitudes[part]), together[part])
    assert torch.equal(images, pictures(20, 24).repeat(12, 1, 1, 1))  # the input is unchanged


def test_one_and_two_threads_give_the_same_bits() -> None:
    images, (operations, magnitudes) = pictures(64, 64).repeat(12, 1, 1, 1), every_operation(60)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(apply(images, operations, magnitudes))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
