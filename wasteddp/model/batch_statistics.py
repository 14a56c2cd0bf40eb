"""BatchNorm's running statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """Return BatchNorm's running means and variances, which each rank computes from its own micro-batches."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[torch.Tensor], names: Collection[str]) -> None:
    """Recompute BatchNorm's running statistics as the mean of the batches' statistics.

    It is for weights that no training step produced, such as a mean of several. Source: Izmailov et al. 2018,
    "Averaging Weights Leads to Wider Optima and Better Generalization", section 3.2.

    Args:
        model: set to eval mode.
        batches: normalised images [B, 3, S, S], all of one size B: each batch has the same weight.
        names: names of the BatchNorms to recompute; the others are unchanged.
    """
    model.eval()
    norms = [module for name, module in model.named_modules() if name in names and isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: the cumulative mean
        norm.train()
    for images_BCHW in batches:
        model(images_BCHW)
    model.eval()
