"""MixUp and CutMix: each image of a micro-batch is blended with, or takes a rectangle of, the next one, on the device.

Legend: B images of a micro-batch, C = 3, H W pixels, K classes.

A micro-batch is the same group of samples at any number of ranks, so its partners are too; what is drawn about it is
keyed by (seed, epoch, its first sample). Sources: Zhang et al. 2018 (MixUp); Yun et al. 2019 (CutMix).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch.nn import functional

from wasteddp.order.keyed_random import I64, MIX, bits


@dataclass(frozen=True, slots=True)
class Mixing:
    """Args: of the Beta distributions that say how much of the own image stays; 0 is never. With both, each half of the
    time, as in timm."""

    seed: int
    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0

    def __call__(
        self, images_BCHW: torch.Tensor, labels_B: torch.Tensor, samples: I64, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(images, targets): targets are float [B, K] that sum to 1, or the labels as they came if nothing is mixed."""
        if not self.mixup and not self.cutmix:
            return images_BCHW, labels_B
        # numpy's generator, since the Beta distribution has no closed inverse; one a micro-batch costs 15 us
        generator = np.random.Generator(np.random.Philox(int(bits(MIX, self.seed, epoch, samples[0]))))
        cuts = generator.random() < (0.5 if self.mixup and self.cutmix else bool(self.cutmix))
        alpha = self.cutmix if cuts else self.mixup
        own = float(generator.beta(alpha, alpha))
        partner_BCHW = images_BCHW.roll(1, dims=0)
        if cuts:
            height, width = images_BCHW.shape[2:]
            rows, columns = _box(height, width, own, generator)
            images_BCHW = images_BCHW.clone()
            images_BCHW[:, :, rows, columns] = partner_BCHW[:, :, rows, columns]
            # the box is cut off at the border and has whole pixels: the targets follow what is really seen
            own = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        else:
            images_BCHW = images_BCHW * own + partner_BCHW * (1 - own)
        targets_BK = functional.one_hot(labels_B, self.num_classes).float()
        return images_BCHW, targets_BK * own + targets_BK.roll(1, dims=0) * (1 - own)


def _box(height: int, width: int, own: float, generator: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of CutMix's rectangle: of area 1 - own before the border cuts it, its centre anywhere."""
    side = sqrt(1 - own)
    row, column = int(height * generator.random()), int(width * generator.random())
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    rows = slice(max(row - half_height, 0), min(row + half_height, height))
    return rows, slice(max(column - half_width, 0), min(column + half_width, width))
