"""torchvision's ResNets by name, with a head for the classes of a shard set; freezing of stages; stochastic depth.

Stochastic depth: in training an image skips some residual blocks, so that a deep network trains like a shallow one.

Source: Huang et al. 2016, "Deep Networks with Stochastic Depth": section 3, with the linear decay rule. As in timm, the
rule starts at the first block, which is never skipped, and ends at the last; each image has its own random choice; and
the branches that are kept are divided by their probability in training, instead of multiplied by it in evaluation.

Legend: B images of a micro-batch, L blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck

from wasteddp.data.augmentation.operations import to_device
from wasteddp.errors import SettingsError
from wasteddp.order.keyed_random import DEPTH, I64, uniform

# In the order of the forward pass. Freezing a stage also freezes the stages before it.
STAGES = {
    "stem": ("conv1", "bn1"),
    "layer1": ("layer1",),
    "layer2": ("layer2",),
    "layer3": ("layer3",),
    "backbone": ("layer4",),
}


def architectures() -> list[str]:
    """Return the names that `build` accepts."""
    return list(torchvision.models.list_models(module=torchvision.models, include="*resne*"))  # resnet and resnext


def build(arch: str, num_classes: int, *, zero_init: bool = True) -> nn.Module:
    """Return a ResNet with random weights and a linear head.

    Args:
        arch: its name in torchvision.
        num_classes: outputs of the head.
        zero_init: initialise the last BatchNorm of each block to zero, so that each block starts as the identity.
            Without it, the first epochs from random weights are unstable at useful learning rates (Source: Goyal et al.
            2017, section 5.1).

    Raises:
        SettingsError: torchvision has no ResNet of that name.
    """
    if arch not in architectures():
        raise SettingsError(
            f"model.arch {arch!r} is not a ResNet of torchvision {torchvision.__version__}",
            "there would be no network to train",
            f"set model.arch to one of {', '.join(architectures())}",
        )
    model: nn.Module = torchvision.models.get_model(
        arch, weights=None, num_classes=num_classes, zero_init_residual=zero_init
    )
    return model


def freeze(model: nn.Module, upto: str) -> None:
    """Disable gradients for every stage up to and including `upto`; "none": all stages stay trainable."""
    for module in frozen_stages(model, upto):
        module.requires_grad_(False)


def drop_gradients(model: nn.Module, upto: str) -> None:
    """Delete the gradients of stages that are frozen now but trained later, so that the optimizer does not change them.

    Their parameters keep `requires_grad`, because DDP plans its messages once, for the parameters that have it at the
    start. The cost is a backward pass through the frozen stages.
    """
    for module in frozen_stages(model, upto):
        for parameter in module.parameters():
            parameter.grad = None


def train_mode(model: nn.Module, upto: str) -> None:
    """Set training mode, except for the frozen stages: their BatchNorm must use and keep its running statistics.

    Otherwise the statistics of frozen stages would change with every batch, although no weight does.
    """
    model.train()
    for module in frozen_stages(model, upto):
        module.eval()


def frozen_stages(model: nn.Module, upto: str) -> list[nn.Module]:
    """Return the modules of all stages up to and including `upto`."""
    if upto == "none":
        return []
    names = list(STAGES)
    return [getattr(model, part) for stage in names[: names.index(upto) + 1] for part in STAGES[stage]]


def distance_from_head(name: str) -> int:
    """Return how many stages before the head a parameter is, from its name: "fc.weight" 0, "conv1.weight" 5."""
    stages = list(STAGES.values())
    number = next((i for i, parts in enumerate(stages) if name.partition(".")[0] in parts), len(stages))
    return len(stages) - number


def is_head(name: str) -> bool:
    """Return whether the parameter of that name belongs to the head."""
    return distance_from_head(name) == 0


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


class StochasticDepth:
    """Stochastic depth for one network.

    torchvision's ResNets do not have it. Forward hooks on the last BatchNorm of each block, whose output is the
    residual branch, add it without changing the network, its parameter names or its evaluation. A branch is multiplied
    by zero rather than left out, so that every step has the same graph for DDP and `torch.compile`.

    Frozen blocks, whose BatchNorm is in evaluation mode, are never skipped.

    Args:
        model: a ResNet. Convert its BatchNorm layers before, if at all: a conversion removes the hooks.
        probability: of skipping the last block.
        seed: of the run.
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
        """Draw which images skip which blocks in the next forward pass. Call it before each one in training.

        The choice is a function of (seed, epoch, sample, block), so it is the same for any number of ranks and after a
        resume.
        """
        draws_BL = uniform(DEPTH, self._seed, epoch, samples, num=len(self._dropped_L))
        factors_BL = np.where(draws_BL < self._dropped_L, 0, 1 / (1 - self._dropped_L))
        factors_LB = to_device(np.ascontiguousarray(factors_BL.T, dtype=np.float32), device)
        self._factors_LB111 = factors_LB[:, :, None, None, None].unbind()

    def _scaled(self, number: int, norm: nn.Module, _: object, branch_BCHW: torch.Tensor) -> torch.Tensor:
        if not norm.training:
            return branch_BCHW
        # in place, since BatchNorm's backward pass does not need its output; same dtype, so that bf16 stays bf16
        return branch_BCHW.mul_(self._factors_LB111[number].to(branch_BCHW.dtype))


def _last_norms(model: nn.Module) -> list[nn.Module]:
    """Return the last BatchNorm of each block, in the order of the forward pass."""
    return [
        block.bn3 if isinstance(block, Bottleneck) else block.bn2
        for block in model.modules()
        if isinstance(block, BasicBlock | Bottleneck)
    ]
