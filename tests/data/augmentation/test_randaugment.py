"""A policy draws torchvision's operations and magnitudes equally often, keyed by (seed, epoch, sample)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from wasteddp import settings
from wasteddp.data.augmentation import operations, randaugment
from wasteddp.data.augmentation.augment import Augment
from wasteddp.data.augmentation.randaugment import F64, Operation
from wasteddp.data.decoding.crop import normalise
from wasteddp.order.keyed_random import I64

SIGNED = range(Operation.SHEAR_X, Operation.SHARPNESS + 1)
TRIVIAL = Augment(0, horizontal_flip=0.5, erase=0.5, policy="trivialaugment")
RAND = Augment(0, vertical_flip=0.5, brightness=0.2, policy="randaugment", policy_ops=3, policy_strength=0.5)


def draw(samples: I64, epoch: int = 0, **changes: Any) -> list[tuple[I64, F64]]:
    asked: dict[str, Any] = {
        "seed": 0,
        "policy": "randaugment",
        "num_ops": 2,
        "strength": 0.3,
        "height": 96,
        "width": 64,
    }
    return list(randaugment.draw(samples, epoch, **asked | changes))


def images(count: int) -> torch.Tensor:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 20, 24), dtype=np.uint8))
    return pixels.contiguous(memory_format=torch.channels_last)


def torchvisions_magnitudes(policy: str, operation: Operation) -> F64:
    """Return the 31 magnitudes, without sign; those of solarize as a level."""
    transform: Any = v2.TrivialAugmentWide if policy == "trivialaugment" else v2.RandAugment
    name = operation.name.title().replace("_", "").replace("Autocontrast", "AutoContrast")
    magnitudes, is_signed = transform._AUGMENTATION_SPACE[name]
    assert is_signed == (operation in SIGNED)
    values = magnitudes(31, 96, 64)
    if values is None:
        return np.zeros(31)
    return values.double().numpy() * (255 if operation == Operation.SOLARIZE else 1)


@pytest.mark.parametrize("policy", ["trivialaugment", "randaugment"])
def test_every_operation_comes_equally_often_in_every_round_and_both_ways(policy: str) -> None:
    rounds = draw(np.arange(14_000), policy=policy)
    assert len(rounds) == (1 if policy == "trivialaugment" else 2)
    for found, magnitudes in rounds:
        counts = np.bincount(found, minlength=14)
        assert len(counts) == 14
        assert abs(counts - 1000).max() < 150  # five standard deviations
        for operation in SIGNED:
            signs = np.sign(magnitudes[found == operation])
            assert abs((signs > 0).mean() - (signs < 0).mean()) < 0.16


def test_the_second_operation_knows_nothing_of_the_first() -> None:
    (first, _), (second, _) = draw(np.arange(39_200))
    pairs = np.bincount(first * 14 + second, minlength=196)
    assert abs(pairs - 200).max() < 71


def test_trivialaugment_has_torchvisions_31_magnitudes_equally_often() -> None:
    ((found, magnitudes),) = draw(np.arange(60_000), policy="trivialaugment")
    for operation in Operation:
        if operation in (Operation.IDENTITY, Operation.AUTOCONTRAST, Operation.EQUALIZE):
            continue
        own = magnitudes[found == operation]
        expected = torchvisions_magnitudes("trivialaugment", operation)
        steps = np.abs(np.abs(own)[:, None] - expected[None])
        assert steps.min(1).max() < 1e-4
        if operation != Operation.POSTERIZE:  # whole bits: several steps are the same
            counts = np.bincount(steps.argmin(1), minlength=31)
            assert abs(counts - len(own) / 31).max() < 5.5 * (len(own) / 31) ** 0.5
        assert (own < 0).any() == (operation in SIGNED)


@pytest.mark.parametrize("magnitude", [0, 9, 11, 30])
def test_randaugments_strength_is_torchvisions_magnitude_of_30(magnitude: int) -> None:
    for found, magnitudes in draw(np.arange(2_000), strength=magnitude / 30):
        for operation in set(Operation) - {Operation.IDENTITY, Operation.AUTOCONTRAST, Operation.EQUALIZE}:
            own = magnitudes[found == operation]
            assert np.abs(np.abs(own) - torchvisions_magnitudes("randaugment", operation)[magnitude]).max() < 1e-4


def test_more_rounds_leave_the_first_as_they_were() -> None:
    for (few, few_magnitudes), (many, many_magnitudes) in zip(
        draw(np.arange(50), num_ops=2), draw(np.arange(50), num_ops=5), strict=False
    ):
        assert np.array_equal(few, many)
        assert np.array_equal(few_magnitudes, many_magnitudes)


@pytest.mark.parametrize("augment", [TRIVIAL, RAND])
def test_a_sample_looks_the_same_in_every_batch_and_order(augment: Augment) -> None:
    batch, samples = images(24), np.arange(100, 124)
    together = augment(batch, samples, 3)
    for part in (slice(0, 5), slice(5, 23), slice(23, 24)):
        assert torch.equal(augment(batch[part], samples[part], 3), together[part])
    assert torch.equal(augment(batch.flip(0), samples[::-1].copy(), 3), together.flip(0))


@pytest.mark.parametrize("policy", ["trivialaugment", "randaugment"])
def test_epochs_samples_and_seeds_differ(policy: str) -> None:
    same = images(1).expand(40, -1, -1, -1)
    first = Augment(0, policy=policy)(same, np.arange(40), 0)
    assert len({image.numpy().tobytes() for image in first}) > 25  # the identity, for example, occurs more than once
    for other in (Augment(0, policy=policy)(same, np.arange(40), 1), Augment(1, policy=policy)(same, np.arange(40), 0)):
        assert (first != other).flatten(1).any(1).sum() > 25


def test_flips_come_before_the_policy_and_erasing_after_it() -> None:
    batch, samples = images(20), np.arange(20)
    expected = batch.flip(3)
    for found, magnitudes in draw(samples, 2, height=20, width=24, strength=0.5):
        expected = operations.apply(expected, found, magnitudes)
    augment = Augment(0, horizontal_flip=1, erase=1, policy="randaugment", policy_strength=0.5)
    seen = augment(batch, samples, 2)
    is_erased = (seen == 0).all(1, keepdim=True)
    assert is_erased.flatten(1).any(1).all()
    assert torch.equal(seen, torch.where(is_erased, 0, normalise(expected)))


def test_without_a_policy_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a policy was asked for")

    monkeypatch.setattr(randaugment, "draw", refuse)
    Augment.from_settings(settings.Augment(), seed=0)(images(4), np.arange(4), 0)


def test_the_settings_reach_the_pixels() -> None:
    asked = settings.Augment(horizontal_flip=0, policy="randaugment", policy_ops=3, policy_strength=0.7)
    plain = Augment(5, policy="randaugment", policy_ops=3, policy_strength=0.7)
    assert torch.equal(
        Augment.from_settings(asked, seed=5)(images(9), np.arange(9), 0), plain(images(9), np.arange(9), 0)
    )
    for other in ({"policy": "trivialaugment"}, {"policy_ops": 2}, {"policy_strength": 0.6}):
        changed = Augment.from_settings(asked.model_copy(update=other), seed=5)
        assert not torch.equal(changed(images(9), np.arange(9), 0), plain(images(9), np.arange(9), 0))
