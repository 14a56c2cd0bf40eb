"""A model with random weights, for benchmarks that need no trained one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wasteddp.data.decoding.crop import MEAN_RGB, STD_RGB
from wasteddp.inference.bundle import BundleCard, Hashes, Preprocessing, Trained
from wasteddp.model.networks import build


def untrained(arch: str, classes: Sequence[str], size_px: int) -> tuple[BundleCard, torch.nn.Module]:
    """Return a card and its network, the same weights each time, in evaluation mode."""
    torch.manual_seed(0)
    card = BundleCard(
        arch=arch,
        classes=tuple(classes),
        preprocessing=Preprocessing(size_px, round(size_px * 256 / 224), MEAN_RGB, STD_RGB),
        trained=Trained(step=0, epoch=0, metric="accuracy", value=0.0),
        hashes=Hashes(manifest="", settings="", code=""),
        tool="benchmark",
    )
    return card, build(arch, len(classes)).eval().requires_grad_(False)
