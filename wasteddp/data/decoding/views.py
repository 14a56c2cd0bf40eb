"""What a sample's bytes become: the view that is trained on, and the one that is evaluated.

Legend: B images, C = 3, S the side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wasteddp.data.decoding.crop import crop_box, evaluation_view, training_view
from wasteddp.data.decoding.decode import Encoded, ImageHWC, header, is_plain_jpeg
from wasteddp.order.keyed_random import CROP, I64, uniform

Draws = npt.NDArray[np.float64]


class View(Protocol):
    """What a sample's bytes become."""

    def draws(self, samples: I64, epoch: int) -> Draws:
        """The random numbers of each sample, [B, any]: in one go, since numpy's overhead is that of a call (60 us)."""

    def fill(self, out: ImageHWC, data: bytes, draws: Draws) -> Encoded | None:
        """Writes the view of one sample, uint8 [S, S, C], or returns what is left to the device. `draws` is its row.
        UndecodableError: it cannot be had."""


@dataclass(frozen=True, slots=True)
class TrainingView:
    """Random crops, each a function of (seed, epoch, sample)."""

    seed: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    on_device: bool = False  # plain JPEGs are left to the device

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
    """The centre; no chance in it."""

    resize_px: int

    def draws(self, samples: I64, epoch: int) -> Draws:
        return np.zeros((len(samples), 0))

    def fill(self, out: ImageHWC, data: bytes, draws: Draws) -> None:
        evaluation_view(data, image_size_px=len(out), resize_px=self.resize_px, out=out)
