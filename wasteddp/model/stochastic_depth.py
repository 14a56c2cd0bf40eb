"""Stochastic depth: in training an image passes by some blocks, so that a deep network learns as a shallow one does.

Source: Huang et al. 2016, "Deep Networks with Stochastic Depth": section 3, with the linear decay rule. As in timm the
rule counts from the first block, which is never passed by, to the last; each image is drawn for itself, and what
remains is divided by its probability in training, instead of multiplied by it in use.

Legend: B images of a micro-batch, L blocks.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from wasteddp.data.augmentation.to_device import to_device
from wasteddp.order.keyed_random import DEPTH, I64, uniform


class StochasticDepth:
    """Of one network. torchvision's ResNets have none, so hooks on the last BatchNorm of each block, whose output is
    the residual branch, do it: the network, its names and its evaluation stay what they are. A branch is multiplied by
    zero rather than left out, so that every step has the same graph, for DDP and for `torch.compile`.

    Blocks that are frozen, their BatchNorm in evaluation mode, are as in evaluation.

    Args:
        model: a ResNet with its BatchNorm as it will be: converted later, it would lose the hooks.
        probability: of passing by the last block.
    """

    def __init__(self, model: nn.Module, probability: float, seed: int) -> None:
        norms = _last_norms(model)
        self._seed = seed
        self._dropped_L = probability * np.arange(len(norms)) / max(1, len(norms) - 1)
        self._factors_LB111: tuple[torch.Tensor, ...] = ()
        for number, norm in enumerate(norms):
            if self._dropped_L[number] > 0:
                norm.register_forward_hook(partial(self._scaled, number))

    def draw(self, samples: I64, epoch: int, device: torch.device) -> None:
        """Before each forward pass in training: which of its images pass by which blocks, a function of (seed, epoch,
        sample, block), so the same at any number of ranks and after a resume."""
        draws_BL = uniform(DEPTH, self._seed, epoch, samples, num=len(self._dropped_L))
        factors_BL = np.where(draws_BL < self._dropped_L, 0, 1 / (1 - self._dropped_L))
        factors_LB = to_device(np.ascontiguousarray(factors_BL.T, dtype=np.float32), device)
        self._factors_LB111 = factors_LB[:, :, None, None, None].unbind()

    def _scaled(self, number: int, norm: nn.Module, _: object, branch_BCHW: torch.Tensor) -> torch.Tensor:
        if not norm.training:
            return branch_BCHW
        # in place: BatchNorm's backward pass needs its input, not its output; of the same type: bf16 must stay bf16
        return branch_BCHW.mul_(self._factors_LB111[number].to(branch_BCHW.dtype))


def _last_norms(model: nn.Module) -> list[nn.Module]:
    """The last BatchNorm of each block, in the order of the forward pass."""
    return [
        block.bn3 if isinstance(block, Bottleneck) else block.bn2
        for block in model.modules()
        if isinstance(block, BasicBlock | Bottleneck)
    ]
