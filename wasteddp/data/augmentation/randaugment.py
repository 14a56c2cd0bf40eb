"""RandAugment and TrivialAugment: which operations happen to an image, which way, how strongly. `operations` does them.

Legend: B images of a micro-batch, R operations on each, one after another.

Sources: Cubuk et al. 2019 (RandAugment); Mueller and Hutter 2021 (TrivialAugment, "wide"); ranges and numbers of steps
are those of torchvision.transforms.v2.RandAugment and TrivialAugmentWide.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from wasteddp.order.keyed_random import I64, POLICY, uniform

F64 = npt.NDArray[np.float64]

_STRENGTHS = 31  # of trivialaugment: 0, 1/30 .. 1


class Operation(IntEnum):
    """In torchvision's order. The magnitude of each is given after it."""

    IDENTITY = 0
    SHEAR_X = 1  # px to the left for each px downwards, from the upper left corner
    SHEAR_Y = 2
    TRANSLATE_X = 3  # px to the right, whole ones: what is after the point is dropped
    TRANSLATE_Y = 4
    ROTATE = 5  # degrees, counterclockwise
    BRIGHTNESS = 6  # -1 black, 0 as it is, 1 twice as far from black; likewise the three below
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10  # bits that stay, of 8
    SOLARIZE = 11  # level from which the image is inverted
    AUTOCONTRAST = 12
    EQUALIZE = 13


_SHEARS = [Operation.SHEAR_X, Operation.SHEAR_Y]
_BLENDS = [Operation.BRIGHTNESS, Operation.COLOR, Operation.CONTRAST, Operation.SHARPNESS]


def drawn(
    samples_B: I64, epoch: int, *, seed: int, policy: str, num_ops: int, strength: float, height: int, width: int
) -> Iterator[tuple[I64, F64]]:
    """For each of the R rounds (operations [B], magnitudes [B]), as `operations.apply` takes them.

    Args:
        policy: randaugment, which goes `num_ops` rounds at `strength`; or trivialaugment: one, of random strength.
        strength: 0 to 1.
        height: of the images, in px, as `width`.
    """
    is_trivial = policy == "trivialaugment"
    rounds = 1 if is_trivial else num_ops
    draws = uniform(POLICY, seed, epoch, samples_B, num=3 * rounds)
    largest = _largest(height, width, is_wide=is_trivial)
    for operation, random_strength, sign in draws.reshape(len(samples_B), rounds, 3).transpose(1, 2, 0):
        operations_B = np.floor(operation * len(Operation)).astype(np.int64)
        random_steps_B = np.floor(random_strength * _STRENGTHS)
        strengths_B = random_steps_B / (_STRENGTHS - 1) if is_trivial else np.full(len(samples_B), strength)
        sizes_B = strengths_B * largest[operations_B]
        magnitudes_B = np.where(sign < 0.5, -sizes_B, sizes_B)
        # these two have no sign, and are stronger the smaller their magnitude is
        magnitudes_B = np.where(operations_B == Operation.POSTERIZE, np.rint(8 - sizes_B), magnitudes_B)
        magnitudes_B = np.where(operations_B == Operation.SOLARIZE, 255 - sizes_B, magnitudes_B)
        yield operations_B, magnitudes_B


def _largest(height: int, width: int, *, is_wide: bool) -> F64:
    """How far each operation goes at strength 1, by its number; 0 for those that have no strength."""
    largest = np.zeros(len(Operation))
    largest[_SHEARS] = 0.99 if is_wide else 0.3
    # wide: pixels, whatever the size, as in the paper; RandAugment: 150 of the 331 px of the image it was found with
    largest[Operation.TRANSLATE_X] = 32 if is_wide else width * 150 / 331
    largest[Operation.TRANSLATE_Y] = 32 if is_wide else height * 150 / 331
    largest[Operation.ROTATE] = 135 if is_wide else 30
    largest[_BLENDS] = 0.99 if is_wide else 0.9
    largest[Operation.POSTERIZE] = 6 if is_wide else 4
    largest[Operation.SOLARIZE] = 255
    return largest
