"""MixUp and CutMix: pixels and targets as in the papers, and the same on every rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wasteddp.data.augmentation.augment import Mixing

SAMPLES = np.arange(40, 46)


def images() -> torch.Tensor:
    return torch.randn(6, 3, 20, 30, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def test_nothing_asked_changes_nothing() -> None:
    pixels = images()
    mixed, targets = Mixing(0, 3)(pixels, LABELS, SAMPLES, 0)
    assert mixed is pixels
    assert targets is LABELS


@pytest.mark.parametrize("epoch", range(5))
def test_mixup_is_the_blend_that_its_targets_say(epoch: int) -> None:
    pixels = images()
    mixed, targets = Mixing(0, 3, mixup=0.8)(pixels, LABELS, SAMPLES, epoch)
    own = float(targets[0, 0])
    for number in range(6):
        expected = own * pixels[number] + (1 - own) * pixels[number - 1]
        assert torch.allclose(mixed[number], expected, atol=1e-6)
        assert targets[number, LABELS[number]] == pytest.approx(own)
        assert targets[number, LABELS[number - 1]] == pytest.approx(1 - own)


@pytest.mark.parametrize("epoch", range(20))
def test_cutmix_takes_a_rectangle_and_the_targets_are_its_area(epoch: int) -> None:
    pixels = images()
    mixed, targets = Mixing(0, 3, cutmix=1.0)(pixels, LABELS, SAMPLES, epoch)
    for number in range(6):
        of_partner = (mixed[number] != pixels[number]).any(0)
        assert torch.equal(mixed[number][:, of_partner], pixels[number - 1][:, of_partner])
        assert torch.equal(mixed[number][:, ~of_partner], pixels[number][:, ~of_partner])
        rows, columns = of_partner.any(1), of_partner.any(0)
        assert torch.equal(of_partner, rows[:, None] & columns[None, :])
        assert targets[number, LABELS[number - 1]] == pytest.approx(float(of_partner.float().mean()), abs=1e-6)
        assert targets[number].sum() == pytest.approx(1)


def test_draws_follow_the_seed_the_epoch_and_the_micro_batch_alone() -> None:
    def own(seed: int, epoch: int, first: int) -> float:
        samples = np.arange(first, first + 6)
        return float(Mixing(seed, 3, mixup=1.0)(images(), LABELS, samples, epoch)[1][0, 0])

    assert own(0, 0, 40) == own(0, 0, 40)
    assert len({own(0, 0, 40), own(1, 0, 40), own(0, 1, 40), own(0, 0, 41)}) == 4


def test_both_are_used_and_the_share_that_stays_is_spread_as_asked() -> None:
    pixels, mixing = images(), Mixing(0, 3, mixup=1.0, cutmix=1.0)
    kinds, shares = [], []
    for epoch in range(400):
        mixed, targets = mixing(pixels, LABELS, SAMPLES, epoch)
        kinds.append(bool((mixed == pixels).any()))  # a blend changes every pixel
        shares.append(float(targets[0, 0]))
    assert 0.4 < np.mean(kinds) < 0.6
    blends = [share for share, cut in zip(shares, kinds, strict=True) if not cut]
    assert np.quantile(blends, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.09)  # Beta(1, 1) is uniform


def test_the_loss_of_mixed_targets_is_the_blend_of_the_losses() -> None:
    """With label smoothing, as in training."""
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    _, targets = Mixing(0, 3, mixup=1.0)(images(), LABELS, SAMPLES, 0)
    own = float(targets[0, 0])
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")
    expected = own * loss(logits, LABELS) + (1 - own) * loss(logits, LABELS.roll(1))
    assert torch.allclose(loss(logits, targets), expected, atol=1e-5)
