"""What training does to a batch on the device: flips, a policy, colour, erasing, normalisation; CPU or GPU, the same.

Legend: B images of a batch, C = 3, H W pixels.

The random numbers come from `draws`, keyed by (seed, epoch, sample), so a sample looks the same whichever rank, worker
or batch it is in. The random crop happens earlier, while decoding (`images.training_view`), by the same rule.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

from wasteddp import settings
from wasteddp.data import operations, policies
from wasteddp.data.draws import COLOUR, ERASE, FLIP, I64, uniform
from wasteddp.data.images import normalise
from wasteddp.data.operations import column
from wasteddp.data.to_device import to_device

# Source: Zhong et al. 2017 (random erasing); torchvision.transforms.RandomErasing's defaults
_ERASE_SCALE = (0.02, 0.33)
_ERASE_RATIO = (0.3, 3.3)
# Source: ITU-R BT.601 luma, as in torchvision.transforms.functional.rgb_to_grayscale
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, slots=True)
class Augment:
    """Settings of the device part; see `settings.Augment` for their meaning."""

    seed: int
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    erase: float = 0.0
    policy: str = "none"
    policy_ops: int = 2
    policy_strength: float = 0.3

    @classmethod
    def of(cls, settings: settings.Augment, seed: int) -> Augment:
        """The part of the settings that happens on the device to one image."""
        return cls(seed, **settings.model_dump(include={field.name for field in fields(cls)}))

    def __call__(self, images_BCHW: torch.Tensor, samples: I64, epoch: int) -> torch.Tensor:
        """uint8 [B, 3, H, W] -> normalised float32 of the same shape and memory format.

        Args:
            images_BCHW: on the device that is to do the work.
            samples: sample numbers, int64 [B].
            epoch: of the batch.
        """
        device = images_BCHW.device
        is_channels_last = images_BCHW.is_contiguous(memory_format=torch.channels_last)
        # One plane a channel for the arithmetic: what is one number an image or a channel is then one number a row of
        # memory, and a batch of 32 at 112 px takes 3 ms on two cores, against 13 ms in channels-last.
        images_BCHW = images_BCHW.contiguous()
        flips = uniform(FLIP, self.seed, epoch, samples, num=2)
        for probability, draw, axis in ((self.horizontal_flip, flips[:, 0], 3), (self.vertical_flip, flips[:, 1], 2)):
            if probability > 0:
                chosen = column(draw < probability, device)
                images_BCHW = torch.where(chosen, images_BCHW.flip(axis), images_BCHW)
        if self.policy != "none":
            images_BCHW = self._policy(images_BCHW, samples, epoch)
        pixels_BCHW = images_BCHW.float()
        if self.brightness or self.contrast or self.saturation:
            pixels_BCHW = self._colour(images_BCHW, pixels_BCHW, samples, epoch)
        normalised = normalise(pixels_BCHW)
        if self.erase:
            keep = ~_erased(samples, epoch, self.seed, self.erase, images_BCHW.shape[2], images_BCHW.shape[3])
            normalised = normalised * to_device(keep[:, None], device)  # 0 is the mean colour
        return normalised.contiguous(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)

    def _policy(self, images_BCHW: torch.Tensor, samples: I64, epoch: int) -> torch.Tensor:
        """One image's operations one after another, each of them for the whole batch at once."""
        rounds = policies.drawn(
            samples,
            epoch,
            seed=self.seed,
            policy=self.policy,
            num_ops=self.policy_ops,
            strength=self.policy_strength,
            height=images_BCHW.shape[2],
            width=images_BCHW.shape[3],
        )
        for operations_B, magnitudes_B in rounds:
            images_BCHW = operations.apply(images_BCHW, operations_B, magnitudes_B)
        return images_BCHW

    def _colour(self, images_BCHW: torch.Tensor, pixels_BCHW: torch.Tensor, samples: I64, epoch: int) -> torch.Tensor:
        """Brightness b, contrast c and saturation s, factors in [1 - x, 1 + x], as the one linear map that they make:

            s c b pixel + (1 - s) c b grey + (1 - c) b mean       grey: the pixel's luma, mean: that of the image

        Source: torchvision.transforms.ColorJitter, in this fixed order and clamped once, at the end.
        """
        height, width = images_BCHW.shape[2:]
        draws = 2 * uniform(COLOUR, self.seed, epoch, samples, num=3) - 1
        b, c, s = (1 + size * draws[:, i] for i, size in enumerate((self.brightness, self.contrast, self.saturation)))
        own, grey, mean = (
            column(f.astype(np.float32), images_BCHW.device) for f in (s * c * b, (1 - s) * c * b, (1 - c) * b)
        )
        red_B1HW, green_B1HW, blue_B1HW = torch.split(pixels_BCHW, 1, dim=1)
        grey_B1HW = red_B1HW * _LUMA[0] + green_B1HW * _LUMA[1] + blue_B1HW * _LUMA[2]
        # sums of integers are the same in whatever order a device or a number of threads adds them
        sums_BC = images_BCHW.sum((2, 3), dtype=torch.int64).double()
        mean_B = (sums_BC[:, 0] * _LUMA[0] + sums_BC[:, 1] * _LUMA[1] + sums_BC[:, 2] * _LUMA[2]) / (height * width)
        offset_B1HW = grey_B1HW * grey + mean_B.float().view(-1, 1, 1, 1) * mean
        return (pixels_BCHW * own).add_(offset_B1HW).clamp_(0, 255)


def _erased(samples: I64, epoch: int, seed: int, probability: float, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Which pixels are erased: bool [B, H, W]."""
    chance, area, ratio, top, left = uniform(ERASE, seed, epoch, samples, num=5).T
    area = height * width * (_ERASE_SCALE[0] + (_ERASE_SCALE[1] - _ERASE_SCALE[0]) * area)
    ratio = np.exp(np.log(_ERASE_RATIO[0]) + np.log(_ERASE_RATIO[1] / _ERASE_RATIO[0]) * ratio)
    box_height = np.minimum(height, np.round(np.sqrt(area * ratio)))
    box_width = np.minimum(width, np.round(np.sqrt(area / ratio)))
    first_row = np.floor((height - box_height + 1) * top)[:, None]
    first_column = np.floor((width - box_width + 1) * left)[:, None]
    rows, columns = np.arange(height)[None, :], np.arange(width)[None, :]
    in_rows = (rows >= first_row) & (rows < first_row + box_height[:, None])  # [B, H]
    in_columns = (columns >= first_column) & (columns < first_column + box_width[:, None])  # [B, W]
    erased: npt.NDArray[np.bool_] = in_rows[:, :, None] & in_columns[:, None, :]
    erased &= (chance < probability)[:, None, None]
    return erased
