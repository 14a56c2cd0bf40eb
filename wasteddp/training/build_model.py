"""Builds the network with its initial weights, DDP, the objective and the optimizer from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from wasteddp.inference.bundle import CARD_NAME, FOLDER_NAME, load_bundle
from wasteddp.model import ema, pretrained, resnet
from wasteddp.settings import Model, Settings
from wasteddp.training import schedule
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed import compilation
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.objective import Objective
from wasteddp.training.optimization import optimizers
from wasteddp.training.optimization.optimizers import ScheduledOptimizer

_MOST_GRAPHS = 64  # that torch.compile may compile of one network


@dataclass(frozen=True, slots=True)
class Built:
    """The trainable parts of a run, on every rank."""

    runtime: Runtime  # including whether this network is compiled
    model: nn.Module  # not wrapped, on the device
    ddp: nn.Module  # the model as Accelerate prepared it
    objective: Objective
    optimizer: ScheduledOptimizer
    average: ema.Average
    origin: str  # a description of the initial weights, for the log


def build(settings: Settings, runtime: Runtime, data: Inputs) -> Built:
    """Build everything that a training step needs, with the initial weights. All ranks.

    Raises:
        SettingsError, WeightsError: on every rank: the network is unknown, or its weights or a compiler are missing.
    """
    runtime = compilation.choose(settings, runtime, data.plan)  # all ranks
    classes, seed, epochs = data.manifest.classes, settings.run.seed, settings.train.epochs
    model, origin = make_network(settings.model, runtime, classes, seed=seed, epochs=epochs)  # all ranks
    plain = optimizers.build(model, settings.optimizer)
    objective = Objective(settings, runtime, data, model)  # all ranks
    ddp, scaled = runtime.prepare(model, plain)  # all ranks
    optimizer = ScheduledOptimizer(
        model,
        plain,
        scaled,
        runtime=runtime,
        settings=settings.optimizer,
        rates=settings.schedule,
        model=settings.model,
        epochs=settings.train.epochs,
        steps_per_epoch=data.plan.steps_per_epoch,
    )
    average = ema.average_of(settings.train.ema_decay, model, ddp)
    return Built(runtime, model, ddp, objective, optimizer, average, origin)


def make_network(
    model: Model, runtime: Runtime, classes: Sequence[str], *, seed: int, epochs: int
) -> tuple[nn.Module, str]:
    """Return the network on the device, with frozen stages, and the origin of its weights for the log. All ranks.

    Args:
        epochs: of the whole run; stages that it never trains are frozen permanently.

    Raises:
        SettingsError, WeightsError: on every rank: the network is unknown or its weights are missing.
    """
    torch.manual_seed(seed)  # the same initial weights on every rank
    with runtime.sharing_errors():
        network = resnet.build(model.arch, len(classes), zero_init=model.zero_init_residual)
        origin = load_weights(network, model, classes)
    if runtime.world_size > 1:
        found = {f"the weights of {origin}": hash_of_state(network)}
        runtime.require_equal(found, "copy the same file of weights to every machine")  # all ranks
    resnet.freeze(network, schedule.frozen_to_the_end(model, epochs))
    return place(
        network, model, device=runtime.device, world_size=runtime.world_size, compiles=runtime.compiles
    ), origin


def place(model: nn.Module, settings: Model, *, device: torch.device, world_size: int, compiles: bool) -> nn.Module:
    """Return the network on the device, ready for DDP. Call it before hooks are set on BatchNorm.

    `model.compile` compiles the forward call in place and inside DDP, at the first call, including the hooks and the
    autocast that are set by then. As with a compiled DDP module, torch splits the graph where a gradient bucket is
    full, so that communication overlaps with the backward pass. But the module is not wrapped, so its parameters get no
    prefix.
    """
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    if settings.sync_batchnorm and world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if compiles:
        compile_in_place(model)
    return model


def compile_in_place(model: nn.Module) -> None:
    # one graph for each image size and set of frozen stages; above its limit, by default 8, torch stops compiling
    torch._dynamo.config.cache_size_limit = max(_MOST_GRAPHS, torch._dynamo.config.cache_size_limit)
    model.compile(dynamic=False)


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


def hash_of_state(model: nn.Module) -> str:
    """Return the first digits of the sha256 of all parameters and buffers."""
    digest = sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
