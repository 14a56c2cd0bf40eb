"""Builds the network with its initial weights, DDP, the objective and the optimizer from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from wasteddp.errors import SettingsError, WeightsError
from wasteddp.inference.bundle import CARD_NAME, FOLDER_NAME, load_bundle
from wasteddp.model import ema, networks, pretrained
from wasteddp.model.networks import TIMM, running_statistics
from wasteddp.model.stages import Stages, refuse_stages
from wasteddp.model.stochastic_depth import branch_ends
from wasteddp.settings import Model, Settings
from wasteddp.training import optimizers, schedule
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed import compilation
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.objective import Objective
from wasteddp.training.optimizers import ScheduledOptimizer

_NEEDS = {"model.stochastic_depth": "residual blocks that an image can skip", "model.sync_batchnorm": "BatchNorm"}
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
    classes = data.manifest.classes
    model, origin = make_network(settings, runtime, classes)  # all ranks
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


def make_network(settings: Settings, runtime: Runtime, classes: Sequence[str]) -> tuple[nn.Module, str]:
    """Return the network on the device, with frozen stages, and the origin of its weights for the log. All ranks.

    Stages that the run never trains are frozen permanently.

    Raises:
        SettingsError, WeightsError: on every rank: the network is unknown, its weights are missing, or a setting does
            not apply to it.
    """
    torch.manual_seed(settings.run.seed)  # the same initial weights on every rank
    with runtime.sharing_errors():
        network, origin = make_initial(settings, classes)
    if runtime.world_size > 1:
        found = {f"the weights of {origin}": hash_of_state(network)}
        runtime.require_equal(found, "copy the same file of weights to every machine")  # all ranks
    model = settings.model
    Stages(network).freeze(schedule.frozen_to_the_end(model, settings.train.epochs))
    return place(
        network, model, device=runtime.device, world_size=runtime.world_size, compiles=runtime.compiles
    ), origin


def make_initial(settings: Settings, classes: Sequence[str]) -> tuple[nn.Module, str]:
    """Return the network with its initial weights, on the CPU, and their origin for the log.

    Raises:
        SettingsError, WeightsError: see `make_network`.
    """
    model = settings.model
    pretrained.refuse_imagenet_weights(model)
    network = networks.build(model.arch, len(classes), zero_init=model.zero_init_residual)
    refuse_inapplicable(network, settings)
    return network, load_weights(network, model, classes)


def refuse_inapplicable(network: nn.Module, settings: Settings) -> None:
    """Refuse settings that do not apply to a family of networks.

    Raises:
        SettingsError: stages, an image size, stochastic depth or BatchNorm that the network does not have.
    """
    model, data = settings.model, settings.data
    layer_decay = settings.optimizer.layer_decay
    refuse_stages(Stages(network), model.arch, freeze=model.freeze, layer_decay=layer_decay)
    for value, lacks, what in (
        (model.stochastic_depth, not branch_ends(network), "model.stochastic_depth"),
        (model.sync_batchnorm, not running_statistics(network), "model.sync_batchnorm"),
    ):
        if value and lacks:
            raise SettingsError(
                f"{what} is {value}, and {model.arch} has no {_NEEDS[what]}",
                "the setting would have no effect",
                f"remove {what}, or use another model.arch",
            )
    sizes = schedule.size_changes(settings.schedule, full_px=data.image_size, epochs=settings.train.epochs)
    networks.refuse_sizes(network, model.arch, {data.eval_size_px, *(side for _, side in sizes)})


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
        model = _convert_batchnorm(model, settings.arch)
    if compiles:
        compile_in_place(model)
    return model


def _convert_batchnorm(model: nn.Module, arch: str) -> nn.Module:
    if arch.startswith(TIMM):  # torch would drop the activation that timm's BatchNorm holds
        from timm.layers import convert_sync_batchnorm

        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return, no-untyped-call]


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
    expected = card.preprocessing.mean, card.preprocessing.std
    if expected != (settings.mean, settings.std):
        raise WeightsError(
            f"the model of {path} expects images normalised with mean {list(expected[0])} and std {list(expected[1])}, "
            f"and model.mean and model.std are {list(settings.mean)} and {list(settings.std)}",
            "its first layer would see other numbers than it was trained on",
            f"set model.mean to {list(expected[0])} and model.std to {list(expected[1])}",
        )
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
