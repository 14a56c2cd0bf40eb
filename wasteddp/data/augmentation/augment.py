"""Augmentation of a batch on the device, with the same results on CPU and GPU.

Legend: B images of a batch or micro-batch, C = 3, H W pixels, K classes.

`Augment` flips images, applies a policy, changes colours, erases rectangles and normalises. The random numbers are
keyed by (seed, epoch, sample), so a sample looks the same in any rank, worker or batch. The random crop is drawn in the
same way, but earlier, while decoding (`decoding.crop`).

`Mixing` implements MixUp and CutMix: each image of a micro-batch is blended with the next image, or gets a rectangle of
it. A micro-batch has the same samples at any number of ranks, so the pairs are the same too. Its random numbers are
keyed by (seed, epoch, its first sample).
Sources: Zhang et al. 2018 (MixUp); Yun et al. 2019 (CutMix).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import sqrt

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from wasteddp import settings
from wasteddp.data.augmentation import operations, randaugment
from wasteddp.data.augmentation.operations import column, to_device
from wasteddp.data.decoding.crop import MEAN_RGB, STD_RGB, normalise
from wasteddp.order.keyed_random import COLOUR, ERASE, FLIP, I64, MIX, bits, uniform

# Source: Zhong et al. 2017 (random erasing); the defaults of torchvision.transforms.RandomErasing
_ERASE_SCALE = (0.02, 0.33)
_ERASE_RATIO = (0.3, 3.3)
# Source: ITU-R BT.601 luma, as in torchvision.transforms.functional.rgb_to_grayscale
LUMA = (0.299, 0.587, 0.114)

Bools = npt.NDArray[np.bool_]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The random changes to each image of a batch.

    A pixel becomes own x pixel + grey x luma of the pixel + mean x mean luma of the image, clamped to 0 .. 255.
    """

    flips_columns_B: Bools
    flips_rows_B: Bools
    own_B: F32
    grey_B: F32
    mean_B: F32
    erased_B4: I64  # first row, row after the last, first column, column after the last

    def table(self) -> F32:
        """Return all fields, in their order: float32 [B, 9]."""
        columns = self.flips_columns_B, self.flips_rows_B, self.own_B, self.grey_B, self.mean_B, *self.erased_B4.T
        return np.stack(columns, axis=1).astype(np.float32)

    def mask(self, height: int, width: int) -> Bools:
        """Return which pixels are erased: bool [B, H, W]."""
        rows, columns = np.arange(height)[None, :, None], np.arange(width)[None, None, :]
        top, bottom, left, right = self.erased_B4.T[:, :, None, None]
        mask: Bools = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        return mask


# (uint8 [B, 3, H, W] channels-last, the changes, whether colours change) -> float32 of the same shape
Kernel = Callable[[torch.Tensor, Drawn, bool], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Augment:
    """Augments single images on the device; see `settings.Augment` for the meaning of the fields."""

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
    mean: tuple[float, float, float] = MEAN_RGB
    std: tuple[float, float, float] = STD_RGB
    kernel: Kernel | None = field(default=None, compare=False)  # does everything except a policy's operations; see `on`

    @classmethod
    def from_settings(
        cls,
        settings: settings.Augment,
        seed: int,
        *,
        mean: tuple[float, float, float] = MEAN_RGB,
        std: tuple[float, float, float] = STD_RGB,
    ) -> Augment:
        """Return the augmentation of the settings, without the crop, MixUp and CutMix."""
        return cls(seed, mean=mean, std=std, **settings.model_dump(include={field.name for field in fields(cls)}))

    @property
    def has_colour(self) -> bool:
        return bool(self.brightness or self.contrast or self.saturation)

    def __call__(self, images_BCHW: torch.Tensor, samples: I64, epoch: int) -> torch.Tensor:
        """Augment a batch: uint8 [B, 3, H, W] -> normalised float32 of the same shape and memory format.

        Args:
            images_BCHW: on the device that does the work.
            samples: sample numbers, int64 [B].
            epoch: of the batch.
        """
        device, (height, width) = images_BCHW.device, images_BCHW.shape[2:]
        is_channels_last = images_BCHW.is_contiguous(memory_format=torch.channels_last)
        drawn = self._draw(samples, epoch, height, width)
        if self.kernel and self.policy == "none" and is_channels_last:
            return self.kernel(images_BCHW, drawn, self.has_colour)
        # The arithmetic uses one plane for each channel. A number of an image or a channel is then constant along a row
        # of memory, and a batch of 32 at 112 px takes 3 ms on two cores instead of 13 ms in channels-last.
        images_BCHW = images_BCHW.contiguous()
        for chosen_B, axis in ((drawn.flips_columns_B, 3), (drawn.flips_rows_B, 2)):
            if chosen_B.any():
                images_BCHW = torch.where(column(chosen_B, device), images_BCHW.flip(axis), images_BCHW)
        if self.policy != "none":
            images_BCHW = self._policy(images_BCHW, samples, epoch)
            if self.kernel and is_channels_last:
                no = np.zeros(len(samples), np.bool_)
                images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
                return self.kernel(images_BCHW, replace(drawn, flips_columns_B=no, flips_rows_B=no), self.has_colour)
        pixels_BCHW = images_BCHW.float()
        if self.has_colour:
            pixels_BCHW = _change_colours(images_BCHW, pixels_BCHW, drawn)
        normalised = normalise(pixels_BCHW, self.mean, self.std)
        if self.erase:
            normalised = normalised * to_device(~drawn.mask(height, width)[:, None], device)  # 0 is the mean colour
        return normalised.contiguous(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)

    def on(self, device: torch.device, say: Callable[[str], object]) -> Augment:
        """Return the same augmentation, with the fused kernel if it has the same bits on this device as on a CPU.

        Args:
            device: that the batches will be on.
            say: called with the reason if the kernel is not used; the results are the same.
        """
        if device.type != "cuda":
            return self
        try:
            from wasteddp.data.augmentation import fused  # Triton comes with torch's CUDA builds on Linux only

            reason = fused.difference(device)
        except Exception as error:  # no Triton, no C compiler, an unknown GPU: each raises another type
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if reason:
            say(f"augmentation launches about 30 kernels a batch instead of one: {reason}")
            return self
        return replace(self, kernel=partial(fused.augment, mean=self.mean, std=self.std))

    def _draw(self, samples: I64, epoch: int, height: int, width: int) -> Drawn:
        flips = uniform(FLIP, self.seed, epoch, samples, num=2)
        colours = 2 * uniform(COLOUR, self.seed, epoch, samples, num=3) - 1
        sizes = self.brightness, self.contrast, self.saturation
        # Brightness b, contrast c and saturation s, factors in [1 - x, 1 + x], together are one linear map.
        # Source: torchvision.transforms.ColorJitter, but always in this order, and clamped only at the end.
        b, c, s = (1 + size * colours[:, number] for number, size in enumerate(sizes))
        return Drawn(
            flips_columns_B=flips[:, 0] < self.horizontal_flip,
            flips_rows_B=flips[:, 1] < self.vertical_flip,
            own_B=(s * c * b).astype(np.float32),
            grey_B=((1 - s) * c * b).astype(np.float32),
            mean_B=((1 - c) * b).astype(np.float32),
            erased_B4=_draw_boxes(samples, epoch, self.seed, self.erase, height, width),
        )

    def _policy(self, images_BCHW: torch.Tensor, samples: I64, epoch: int) -> torch.Tensor:
        """Apply the operations of each image in order, each round to the whole batch."""
        rounds = randaugment.draw(
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


def mean_luma(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the mean of each image's luma, float64 [B]; the same bits on each device."""
    # sums of integers do not depend on the order in which a device or its threads add them
    sums_BC = images_BCHW.sum((2, 3), dtype=torch.int64).double()
    num_pixels = images_BCHW.shape[2] * images_BCHW.shape[3]
    return (sums_BC[:, 0] * LUMA[0] + sums_BC[:, 1] * LUMA[1] + sums_BC[:, 2] * LUMA[2]) / num_pixels


def _change_colours(images_BCHW: torch.Tensor, pixels_BCHW: torch.Tensor, drawn: Drawn) -> torch.Tensor:
    device = images_BCHW.device
    own, grey, mean = (column(factor_B, device) for factor_B in (drawn.own_B, drawn.grey_B, drawn.mean_B))
    red_B1HW, green_B1HW, blue_B1HW = torch.split(pixels_BCHW, 1, dim=1)
    grey_B1HW = red_B1HW * LUMA[0] + green_B1HW * LUMA[1] + blue_B1HW * LUMA[2]
    offset_B1HW = grey_B1HW * grey + mean_luma(images_BCHW).float().view(-1, 1, 1, 1) * mean
    return (pixels_BCHW * own).add_(offset_B1HW).clamp_(0, 255)


def _draw_boxes(samples: I64, epoch: int, seed: int, probability: float, height: int, width: int) -> I64:
    """Return `Drawn.erased_B4`; four zeros for an image without an erased rectangle."""
    chance, area, ratio, top, left = uniform(ERASE, seed, epoch, samples, num=5).T
    area = height * width * (_ERASE_SCALE[0] + (_ERASE_SCALE[1] - _ERASE_SCALE[0]) * area)
    ratio = np.exp(np.log(_ERASE_RATIO[0]) + np.log(_ERASE_RATIO[1] / _ERASE_RATIO[0]) * ratio)
    box_height = np.minimum(height, np.round(np.sqrt(area * ratio)))
    box_width = np.minimum(width, np.round(np.sqrt(area / ratio)))
    first_row, first_column = np.floor((height - box_height + 1) * top), np.floor((width - box_width + 1) * left)
    box_B4 = np.stack((first_row, first_row + box_height, first_column, first_column + box_width), axis=1)
    return np.where((chance < probability)[:, None], box_B4, 0).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Mixing:
    """MixUp and CutMix of a micro-batch. If both are on, each is used half of the time, as in timm.

    Args:
        seed: of the run.
        num_classes: K.
        mixup: alpha of MixUp's Beta distribution of the fraction of the own image that stays; 0: off.
        cutmix: alpha of CutMix's Beta distribution; 0: off.
    """

    seed: int
    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0

    def __call__(
        self, images_BCHW: torch.Tensor, labels_B: torch.Tensor, samples: I64, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (images, targets): targets are float [B, K] with rows that sum to 1, or the labels if both are off."""
        if not self.mixup and not self.cutmix:
            return images_BCHW, labels_B
        # numpy's generator, since the Beta distribution has no closed inverse; creating one costs 15 us a micro-batch
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
            # the border cuts the box off, and it has whole pixels: the targets use the area that is really visible
            own = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        else:
            images_BCHW = images_BCHW * own + partner_BCHW * (1 - own)
        targets_BK = functional.one_hot(labels_B, self.num_classes).float()
        return images_BCHW, targets_BK * own + targets_BK.roll(1, dims=0) * (1 - own)


def _box(height: int, width: int, own: float, generator: np.random.Generator) -> tuple[slice, slice]:
    """Return rows and columns of CutMix's rectangle: area 1 - own before the border cuts it off, centre anywhere."""
    side = sqrt(1 - own)
    row, column = int(height * generator.random()), int(width * generator.random())
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    rows = slice(max(row - half_height, 0), min(row + half_height, height))
    return rows, slice(max(column - half_width, 0), min(column + half_width, width))
