"""Adaptive gradient clipping: no unit's gradient is larger than a part of its weights. So one noisy batch moves no
layer far, whatever the scale of the loss.

Source: Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization", section 4, eq. 3.
Legend: U units, the output channels of all layers that are clipped.
"""

from __future__ import annotations

import torch
from torch import nn

from wasteddp.model import resnet

_LEAST_SIZE = 1e-3  # of a unit's weights: else what starts at zero would stay there


@torch.no_grad()
def clip_(model: nn.Module, limit: float) -> None:
    """Scales the averaged, unscaled gradient of each unit W_i down to norm `limit` max(|W_i|, 1e-3) where it is larger.

    The head is left out, as in the paper. So are biases and norms, which the paper has not: the last BatchNorm of each
    block starts at zero, and could move by limit x 0.001 only. It happens on the device, without a look from the host.
    """
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and parameter.grad is not None and not resnet.is_head(name)
    ]
    if not weights:  # all but the head are frozen
        return
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    allowed_U = limit * _unit_norms(weights).clamp_(min=_LEAST_SIZE)
    factors_U = (allowed_U / _unit_norms(gradients)).clamp_(max=1)  # infinite, so 1, where the gradient is zero
    parts = torch.split(factors_U, [len(weight) for weight in weights])
    torch._foreach_mul_(gradients, [p.view(-1, *[1] * (w.ndim - 1)) for p, w in zip(parts, weights, strict=True)])


def _unit_norms(tensors: list[torch.Tensor] | list[nn.Parameter]) -> torch.Tensor:
    """[U]: of each row along the first axis, that of the outputs."""
    return torch.cat([torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim))) for tensor in tensors])
