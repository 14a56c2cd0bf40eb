"""Builds the network with its initial weights, DDP, the optimizer and the recipe from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wasteddp.inference.bundle import CARD_NAME, FOLDER_NAME, load_bundle
from wasteddp.model import ema, pretrained, resnet
from wasteddp.settings import Model, Settings
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed import compilation, same_ranks
from wasteddp.training.distributed.placement import place
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.optimization import optimizers
from wasteddp.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Built:
    """The trainable parts of a run, on every rank."""

    world: Runtime  # including whether this network is compiled
    model: nn.Module  # not wrapped, on the device
    ddp: nn.Module  # the model as Accelerate prepared it
    optimizer: torch.optim.Optimizer  # not wrapped
    stepper: Any  # the optimizer as Accelerate wraps it, for step() and zero_grad()
    recipe: Recipe
    average: ema.Average
    origin: str  # a description of the initial weights, for the log


def build(settings: Settings, world: Runtime, data: Inputs) -> Built:
    """Build everything that a training step needs, with the initial weights. All ranks.

    Raises:
        SettingsError, WeightsError: on every rank: the network is unknown, or its weights or a compiler are missing.
    """
    world = compilation.choose(settings, world, data.plan)  # all ranks
    model, origin = make_network(settings, world, data.manifest.classes)  # all ranks
    optimizer = optimizers.build(model, settings.optimizer)
    recipe = Recipe(settings, world, data, model)  # all ranks
    ddp, stepper = world.prepare(model, optimizer)  # all ranks
    average = ema.average_of(settings.train.ema_decay, model, ddp)
    return Built(world, model, ddp, optimizer, stepper, recipe, average, origin)


def make_network(settings: Settings, world: Runtime, classes: Sequence[str]) -> tuple[nn.Module, str]:
    """Return the network on the device, with frozen stages, and the origin of its weights for the log. All ranks.

    Raises:
        SettingsError, WeightsError: on every rank: the network is unknown or its weights are missing.
    """
    model = settings.model
    torch.manual_seed(settings.run.seed)  # the same initial weights on every rank
    with world.together():
        network = resnet.build(model.arch, len(classes), zero_init=model.zero_init_residual)
        origin = load_weights(network, model, classes)
    if world.world_size > 1:
        found = world.gather({f"the weights of {origin}": same_ranks.hash_of_state(network)})  # all ranks
        same_ranks.refuse_different(found, "copy the same file of weights to every machine")
    resnet.freeze(network, resnet.frozen_to_the_end(model, settings.train.epochs))
    return place(network, model, device=world.device, world_size=world.world_size, compiles=world.compiles), origin


def load_weights(network: nn.Module, settings: Model, classes: Sequence[str]) -> str:
    """Load the initial weights. Return where they come from, for the log.

    Of a run or a bundle the head's rows are taken too, class by class.
    """
    path = Path(settings.weights)
    if not any((folder / CARD_NAME).is_file() for folder in (path, path / FOLDER_NAME)):
        return pretrained.initialise(network, settings.arch, settings.weights)
    card, state = load_bundle(path)
    pretrained.load_backbone(network, settings.arch, state, str(path))
    known = pretrained.load_head(network, state, old=card.classes, new=classes)
    fresh = "" if known == len(classes) else f", {len(classes) - known} fresh"
    return f"the model of {path} (step {card.trained.step}), its head for {known} of {len(classes)} classes{fresh}"
