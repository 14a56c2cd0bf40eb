"""Stochastic depth: in training an image skips some residual blocks, so that a deep network trains like a shallow one.

Source: Huang et al. 2016, "Deep Networks with Stochastic Depth": section 3, with the linear decay rule. As in timm, the
rule starts at the first block, which is never skipped, and ends at the last; each image has its own random choice; and
the branches that are kept are divided by their probability in training, instead of multiplied by it in evaluation.

Legend: B images of a micro-batch, L blocks.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn
from torchvision import ops
from torchvision.models.resnet import BasicBlock, Bottleneck

from wasteddp.data.augmentation.operations import to_device
from wasteddp.order.keyed_random import DEPTH, I64, uniform


class StochasticDepth:
    """Stochastic depth for one network.

    Forward hooks on the modules whose output is the residual branch add it without changing the network, its parameter
    names or its evaluation: on the last BatchNorm of each block of a ResNet, and on torchvision's own StochasticDepth
    of the other families, which is switched off. A branch is multiplied by zero rather than left out, so that every
    step has the same graph for DDP and `torch.compile`.

    Frozen blocks, which are in evaluation mode, are never skipped.

    Args:
        model: with at least one such block. Convert its BatchNorm layers before, if at all: a conversion removes the
            hooks.
        probability: of skipping the last block.
        seed: of the run.
    """

    def __init__(self, model: nn.Module, probability: float, seed: int) -> None:
        branches = branch_ends(model)
        self._seed = seed
        self._dropped_L = probability * np.arange(len(branches)) / max(1, len(branches) - 1)
        self._factors_LB111: tuple[torch.Tensor, ...] = ()
        for number, branch in enumerate(branches):
            if self._dropped_L[number] > 0:
                branch.register_forward_hook(partial(self._scaled, number))

    def draw(self, samples: I64, epoch: int, device: torch.device) -> None:
        """Draw which images skip which blocks in the next forward pass. Call it before each one in training.

        The choice is a function of (seed, epoch, sample, block), so it is the same for any number of ranks and after a
        resume.
        """
        draws_BL = uniform(DEPTH, self._seed, epoch, samples, num=len(self._dropped_L))
        factors_BL = np.where(draws_BL < self._dropped_L, 0, 1 / (1 - self._dropped_L))
        factors_LB = to_device(np.ascontiguousarray(factors_BL.T, dtype=np.float32), device)
        self._factors_LB111 = factors_LB[:, :, None, None, None].unbind()

    def _scaled(self, number: int, module: nn.Module, _: object, branch_BCHW: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return branch_BCHW
        factors_B111 = self._factors_LB111[number].to(branch_BCHW.dtype)  # so that bf16 stays bf16
        if isinstance(module, ops.StochasticDepth):  # its output is its input, which the block may use again
            return branch_BCHW * factors_B111
        return branch_BCHW.mul_(factors_B111)  # in place, since BatchNorm's backward pass does not need its output


def branch_ends(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose output is the residual branch of a block, in the order of the forward pass."""
    ends: list[nn.Module] = []
    for block in model.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            ends.append(block.bn3 if isinstance(block, Bottleneck) else block.bn2)
        elif isinstance(block, ops.StochasticDepth):
            ends.append(block)
    return ends
