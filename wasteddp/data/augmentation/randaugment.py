"""RandAugment and TrivialAugment: random choice of the operations on each image and their magnitudes.

`operations` applies them.

Legend: B images of a micro-batch, R operations on each, one after another.

Sources: Cubuk et al. 2019 (RandAugment); Mueller and Hutter 2021 (TrivialAugment, "wide"); the ranges and numbers of
steps are those of torchvision.transforms.v2.RandAugment and TrivialAugmentWide.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from wasteddp.order.keyed_random import I64, POLICY, uniform

F64 = npt.NDArray[np.float64]

_STRENGTHS = 31  # for trivialaugment: 0, 1/30 .. 1


class Operation(IntEnum):
    """Operations in torchvision's order, with the meaning of their magnitudes."""

    IDENTITY = 0
    SHEAR_X = 1  # px to the left for each px down from the upper left corner
    SHEAR_Y = 2
    TRANSLATE_X = 3  # px to the right, truncated to an integer
    TRANSLATE_Y = 4
    ROTATE = 5  # degrees, counterclockwise
    BRIGHTNESS = 6  # -1: black; 0: unchanged; 1: twice as far from black; likewise for the next three
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10  # bits that are kept, of 8
    SOLARIZE = 11  # level from which the image is inverted
    AUTOCONTRAST = 12
    EQUALIZE = 13


_SHEARS = [Operation.SHEAR_X, Operation.SHEAR_Y]
_BLENDS = [Operation.BRIGHTNESS, Operation.COLOR, Operation.CONTRAST, Operation.SHARPNESS]


def draw(
    samples_B: I64, epoch: int, *, seed: int, policy: str, num_ops: int, strength: float, height: int, width: int
) -> Iterator[tuple[I64, F64]]:
    """Yield (operations [B], magnitudes [B]) for each of the R rounds, as arguments of `operations.apply`.

    Args:
        samples_B: sample numbers, int64 [B].
        epoch: of the batch.
        seed: of the run.
        policy: randaugment: `num_ops` rounds of `strength`; trivialaugment: one round of random strength.
        num_ops: see `policy`.
        strength: 0 to 1.
        height: of the images, px.
        width: of the images, px.
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
        # these two have no sign, and a smaller magnitude is stronger
        magnitudes_B = np.where(operations_B == Operation.POSTERIZE, np.rint(8 - sizes_B), magnitudes_B)
        magnitudes_B = np.where(operations_B == Operation.SOLARIZE, 255 - sizes_B, magnitudes_B)
        yield operations_B, magnitudes_B


def _largest(height: int, width: int, *, is_wide: bool) -> F64:
    """Return the largest magnitude of each operation, at strength 1; 0 for operations without a strength."""
    largest = np.zeros(len(Operation))
    largest[_SHEARS] = 0.99 if is_wide else 0.3
    # wide: pixels at any image size, as in the paper; RandAugment: 150 of 331 px, the image size of its search
    largest[Operation.TRANSLATE_X] = 32 if is_wide else width * 150 / 331
    largest[Operation.TRANSLATE_Y] = 32 if is_wide else height * 150 / 331
    largest[Operation.ROTATE] = 135 if is_wide else 30
    largest[_BLENDS] = 0.99 if is_wide else 0.9
    largest[Operation.POSTERIZE] = 6 if is_wide else 4
    largest[Operation.SOLARIZE] = 255
    return largest
