"""The network that a run trains, as the settings ask for it, with its initial weights."""

from __future__ import annotations

import torch
from torch import nn

from wasteddp.model import pretrained, resnet
from wasteddp.settings import Settings
from wasteddp.training.distributed.placement import placed
from wasteddp.training.distributed.runtime import Runtime


def made(settings: Settings, world: Runtime, num_classes: int) -> tuple[nn.Module, str]:
    """All ranks: the network on the device, frozen as set; and where its weights come from, for the log.

    Raises:
        SettingsError, WeightsError: on every rank: no such network, or its weights cannot be had.
    """
    model = settings.model
    torch.manual_seed(settings.run.seed)  # the same initial weights on every rank
    with world.together():
        network = resnet.build(model.arch, num_classes, zero_init=model.zero_init_residual)
        origin = pretrained.initialise(network, model.arch, model.weights)
    resnet.freeze(network, resnet.frozen_to_the_end(model, settings.train.epochs))
    return placed(network, model, device=world.device, world_size=world.world_size, compiles=world.compiles), origin
