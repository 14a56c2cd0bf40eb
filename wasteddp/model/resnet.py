"""torchvision's ResNets by name, with a head for our classes, and what freezing a part of one means.

Stochastic depth: in training an image passes by some blocks, so that a deep network learns as a shallow one does.

Source: Huang et al. 2016, "Deep Networks with Stochastic Depth": section 3, with the linear decay rule. As in timm the
rule counts from the first block, which is never passed by, to the last; each image is drawn for itself, and what
remains is divided by its probability in training, instead of multiplied by it in use.

Legend: B images of a micro-batch, L blocks.
"""

from __future__ import annotations

from functools import partial
from math import floor

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from wasteddp.data.augmentation.operations import to_device
from wasteddp.errors import SettingsError
from wasteddp.order.keyed_random import DEPTH, I64, uniform
from wasteddp.settings import Model

# In the order of the forward pass; freezing up to a stage freezes those before it too.
STAGES = {
    "stem": ("conv1", "bn1"),
    "layer1": ("layer1",),
    "layer2": ("layer2",),
    "layer3": ("layer3",),
    "backbone": ("layer4",),
}


def architectures() -> list[str]:
    """Names that `build` takes."""
    return list(torchvision.models.list_models(module=torchvision.models, include="*resne*"))  # resnet and resnext


def build(arch: str, num_classes: int, *, zero_init: bool = True) -> nn.Module:
    """A ResNet with random weights and a linear head of `num_classes`.

    Args:
        arch: its name in torchvision.
        num_classes: outputs.
        zero_init: the last BatchNorm of each block starts at zero, so that each block starts as the identity:
            without it the first epochs from random weights are unstable at useful learning rates (Source: Goyal et al.
            2017, section 5.1).

    Raises:
        SettingsError: no ResNet of that name.
    """
    if arch not in architectures():
        raise SettingsError(
            f"model.arch {arch!r} is no ResNet of torchvision {torchvision.__version__}",
            "there is no network to train",
            f"take one of {', '.join(architectures())}",
        )
    model: nn.Module = torchvision.models.get_model(
        arch, weights=None, num_classes=num_classes, zero_init_residual=zero_init
    )
    return model


def freeze(model: nn.Module, upto: str) -> None:
    """Stops gradients for every stage up to and with `upto`; "none" leaves all trainable."""
    for module in frozen_stages(model, upto):
        module.requires_grad_(False)


def frozen_at(freeze: str, unfreeze_every_epochs: float, epoch: float) -> str:
    """The stage up to which a network is frozen after `epoch` epochs, with their fraction; "none" if it is not.

    Gradual unfreezing: the last frozen stage is trained too after so many epochs (0: never), then the one before it.
    Source: Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section 3.3.
    """
    if freeze == "none" or not unfreeze_every_epochs:
        return freeze
    names = ["none", *STAGES]
    num_unfrozen = floor(epoch / unfreeze_every_epochs + 1e-9)  # 3 steps of 10 are not quite three times 0.1 epochs
    return names[max(0, names.index(freeze) - num_unfrozen)]


def frozen_to_the_end(settings: Model, epochs: int) -> str:
    """What is frozen in the last step of `epochs` epochs still, and so is never trained."""
    return frozen_at(settings.freeze, settings.unfreeze_every_epochs, epochs - 1e-6)  # an epoch has < 1e6 steps


def drop_gradients(model: nn.Module, upto: str) -> None:
    """Forgets the gradients of what is frozen now and trained later: neither momentum nor decay then moves it.

    It keeps `requires_grad`, because DDP plans its messages once, for the parameters that have it at the start. The
    price is a backward pass through what is frozen.
    """
    for module in frozen_stages(model, upto):
        for parameter in module.parameters():
            parameter.grad = None


def train_mode(model: nn.Module, upto: str) -> None:
    """Training mode, except for the frozen stages: their BatchNorm must use, and keep, its running statistics.

    Without it a frozen network still drifts: the statistics move with every batch although no weight does.
    """
    model.train()
    for module in frozen_stages(model, upto):
        module.eval()


def frozen_stages(model: nn.Module, upto: str) -> list[nn.Module]:
    if upto == "none":
        return []
    names = list(STAGES)
    return [getattr(model, part) for stage in names[: names.index(upto) + 1] for part in STAGES[stage]]


def distance_from_head(name: str) -> int:
    """How many stages a parameter's is before the head, by the parameter's name: "fc.weight" 0, "conv1.weight" 5."""
    stages = list(STAGES.values())
    number = next((i for i, parts in enumerate(stages) if name.partition(".")[0] in parts), len(stages))
    return len(stages) - number


def is_head(name: str) -> bool:
    """Whether the parameter of that name is after all stages."""
    return distance_from_head(name) == 0


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """BatchNorm's running means and variances, which each rank gathers from its own micro-batches."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


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
