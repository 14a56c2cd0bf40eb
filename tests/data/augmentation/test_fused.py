"""The fused kernel has the bits of `Augment`: here in Triton's interpreter, in tests/gpu on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from wasteddp.data.augmentation.augment import Augment

pytest.importorskip("triton")
ALL = Augment(0, horizontal_flip=0.5, vertical_flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, erase=0.5)


@pytest.fixture(scope="module")
def fused() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is defined
        from wasteddp.data.augmentation import fused as fused_augment

        yield importlib.reload(fused_augment)
    importlib.reload(fused_augment)


def images(count: int, height: int = 20, width: int = 24) -> torch.Tensor:
    shape = (count, height, width, 3)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    return pixels.permute(0, 3, 1, 2)


def bits(images_BCHW: torch.Tensor) -> torch.Tensor:
    return images_BCHW.contiguous().view(torch.int32)


@pytest.mark.parametrize(
    "augment",
    [
        ALL,
        Augment(3),
        Augment(3, horizontal_flip=0.5),
        Augment(3, vertical_flip=0.5),
        Augment(3, brightness=0.9, contrast=0.9, saturation=0.9),  # many values are clamped
        Augment(3, saturation=0.2),
        Augment(3, erase=1),
        replace(ALL, policy="randaugment"),
    ],
    ids=lambda augment: "-".join(name for name in ("policy", "erase", "saturation") if getattr(augment, name)) or "few",
)
@pytest.mark.parametrize("size", [(20, 24), (1, 1), (33, 7), (32, 32)])
def test_the_kernel_gives_the_same_bits(fused: ModuleType, augment: Augment, size: tuple[int, int]) -> None:
    batch, samples = images(9, *size), np.arange(100, 109)
    expected = augment(batch, samples, 3)
    found = replace(augment, kernel=fused.augment)(batch, samples, 3)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(bits(found), bits(expected))


def test_the_check_at_the_start_sees_a_kernel_that_differs(fused: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.difference(torch.device("cpu")) == ""
    whole = fused.augment

    def other(images_BCHW: torch.Tensor, drawn: object, has_colour: bool) -> torch.Tensor:
        result: torch.Tensor = whole(images_BCHW, drawn, has_colour)
        result[0, 0, 0, 0] = torch.nextafter(result[0, 0, 0, 0], torch.tensor(9.0))
        return result

    monkeypatch.setattr(fused, "augment", other)
    assert "1 of 215,040 values" in fused.difference(torch.device("cpu"))


def test_what_is_not_channels_last_goes_the_other_way(fused: ModuleType) -> None:
    batch = images(4).contiguous()
    augment = replace(ALL, kernel=fused.augment)
    assert augment(batch, np.arange(4), 0).is_contiguous()
    assert torch.equal(augment(batch, np.arange(4), 0), ALL(batch, np.arange(4), 0))


def test_an_unavailable_kernel_is_reported_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from wasteddp.data.augmentation import fused as fused_augment

    def fail(_: torch.device) -> str:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    said: list[str] = []
    monkeypatch.setattr(fused_augment, "difference", fail)
    assert ALL.on(torch.device("cuda"), said.append).kernel is None
    monkeypatch.setattr(fused_augment, "difference", lambda _: "3 of 9 values differ from the CPU's")
    assert ALL.on(torch.device("cuda"), said.append).kernel is None
    assert [line.partition(": ")[2] for line in said] == [
        "RuntimeError: Failed to find C compiler.",
        "3 of 9 values differ from the CPU's",
    ]
    monkeypatch.setattr(fused_augment, "difference", lambda _: "")
    assert ALL.on(torch.device("cuda"), said.append).kernel is not None
    assert ALL.on(torch.device("cpu"), said.append).kernel is None
    assert len(said) == 2
