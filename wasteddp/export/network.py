"""The network to export: from uint8 RGB to calibrated probabilities, as one module.

Legend: B images, S side of the view, K classes, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wasteddp.inference.bundle import BundleCard
from wasteddp.model.networks import head_name


class Exported(nn.Module):
    """Normalisation, network and temperature.

    Args:
        card: of the network.
        network: in evaluation mode, on the CPU.
    """

    shift: torch.Tensor
    factor: torch.Tensor

    def __init__(self, card: BundleCard, network: nn.Module) -> None:
        super().__init__()
        self.network, self.temperature = network, card.temperature
        size = card.preprocessing
        # as `decoding.crop.normalise`
        self.register_buffer("shift", torch.tensor([255.0 * m for m in size.mean]).view(1, 3, 1, 1))
        self.register_buffer("factor", torch.tensor([1.0 / (255.0 * s) for s in size.std]).view(1, 3, 1, 1))
        self._features: Any = None
        network.get_submodule(head_name(network)).register_forward_pre_hook(self._keep)
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return probabilities, logits and features of uint8 [B, S, S, 3]: float32 [B, K], [B, K] and [B, D]."""
        pixels_BCHW = (images.permute(0, 3, 1, 2).float() - self.shift) * self.factor
        logits_BK = self.network(pixels_BCHW)
        return (logits_BK / self.temperature).softmax(dim=1), logits_BK, self._features

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._features = inputs[0]


def trace(module: Exported, side_px: int) -> torch.export.ExportedProgram:
    """Return the graph of the module, for any number of images."""
    images = torch.zeros((2, side_px, side_px, 3), dtype=torch.uint8)
    with torch.no_grad():
        return torch.export.export(
            module, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
        )
