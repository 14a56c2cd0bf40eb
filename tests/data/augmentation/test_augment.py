"""Augmentation on the device depends on (seed, epoch, sample), not on the other samples of the batch."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.transforms.v2 import functional

from wasteddp.data.augmentation.augment import Augment
from wasteddp.data.decoding.crop import MEAN_RGB, STD_RGB, normalise
from wasteddp.order.keyed_random import COLOUR, uniform

ALL = Augment(0, horizontal_flip=0.5, vertical_flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, erase=0.5)


def images(count: int) -> torch.Tensor:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8))
    return pixels.permute(0, 3, 1, 2)


def test_a_sample_looks_the_same_in_every_batch() -> None:
    batch, samples = images(12), np.arange(100, 112)
    together = ALL(batch, samples, 3)
    for part in (slice(0, 5), slice(5, 12), slice(7, 8)):
        assert torch.equal(ALL(batch[part], samples[part], 3), together[part])


def test_epochs_samples_and_seeds_differ() -> None:
    same = images(1).expand(8, -1, -1, -1)
    first = ALL(same, np.arange(8), 0)
    assert len({first[i].numpy().tobytes() for i in range(8)}) == 8
    assert not torch.equal(first, ALL(same, np.arange(8), 1))


def test_nothing_asked_is_only_normalised() -> None:
    assert torch.equal(Augment(0)(images(4), np.arange(4), 0), normalise(images(4)))


def test_certain_flips_flip() -> None:
    both = Augment(0, horizontal_flip=1, vertical_flip=1)(images(3), np.arange(3), 0)
    assert torch.equal(both, normalise(images(3).flip(2, 3)))


def test_flips_happen_as_often_as_asked() -> None:
    batch = images(1).expand(2000, -1, -1, -1)
    flipped = Augment(0, horizontal_flip=0.3)(batch, np.arange(2000), 0) != normalise(batch)
    assert abs(flipped.flatten(1).any(1).float().mean() - 0.3) < 0.04


def test_erasing_leaves_the_mean_colour_in_one_rectangle() -> None:
    white = torch.full((200, 3, 30, 40), 255, dtype=torch.uint8)
    erased = Augment(0, erase=1)(white, np.arange(200), 0) == 0
    areas = erased[:, 0].float().mean((1, 2))
    assert areas.min() > 0.01
    assert areas.max() < 0.36
    for one in erased[:, 0]:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns[None, :])


def test_colour_stays_in_range_and_changes_brightness_both_ways() -> None:
    grey = torch.full((500, 3, 4, 4), 120, dtype=torch.uint8)
    pixels = Augment(0, brightness=0.5)(grey, np.arange(500), 0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN_RGB, STD_RGB))
    levels = (pixels * std + mean) * 255
    assert levels.min() >= 59
    assert levels.max() <= 181
    assert levels.min() < 70
    assert levels.max() > 170


def test_colour_is_torchvisions_where_nothing_is_clamped() -> None:
    batch = images(8) // 4 + 64  # 64 to 127, so that factors of 0.7 to 1.3 stay between 0 and 255
    b, c, s = 1 + 0.3 * (2 * uniform(COLOUR, 0, 5, np.arange(8), num=3).T - 1)
    coloured = Augment(0, brightness=0.3, contrast=0.3, saturation=0.3)(batch, np.arange(8), 5)
    for image, found, brightness, contrast, saturation in zip(batch, coloured, b, c, s, strict=True):
        expected = functional.adjust_brightness(image.float() / 255, brightness)
        expected = functional.adjust_saturation(functional.adjust_contrast(expected, contrast), saturation)
        assert torch.allclose(
            found, normalise(255 * expected[None])[0], atol=0.02
        )  # 0.02, since torchvision's luma has 4 digits


def test_the_memory_format_is_kept() -> None:
    for layout in (torch.channels_last, torch.contiguous_format):
        assert ALL(images(4).contiguous(memory_format=layout), np.arange(4), 0).is_contiguous(memory_format=layout)
