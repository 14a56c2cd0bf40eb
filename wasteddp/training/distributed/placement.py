"""Puts a network on a device: memory format, SyncBatchNorm, compilation; and refuses what torch does not support."""

from __future__ import annotations

import torch
from torch import nn

from wasteddp.errors import SettingsError
from wasteddp.settings import Model, Settings

_MOST_GRAPHS = 64  # that torch.compile may compile of one network


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


def refuse_impossible(settings: Settings, num_processes: int, accumulation: int, *, has_gpu: bool) -> None:
    """Refuse settings that torch does not support, before the processes join: all of them end with the same message.

    Raises:
        SettingsError: torch does not support the settings with this number of processes.
    """
    if num_processes == 1:
        return
    if settings.model.sync_batchnorm and not has_gpu:
        raise SettingsError(
            f"model.sync_batchnorm is set and the {num_processes} processes have no GPU",
            "torch's SyncBatchNorm does not support CPU tensors: the first step would fail",
            "set model.sync_batchnorm to false, or train on GPUs",
        )
    if settings.ddp.static_graph and not settings.train.max_micro_batch:
        raise SettingsError(
            "ddp.static_graph is set and train.max_micro_batch is 0, so the micro-batch size is found later",
            "DDP records a static graph in the first backward pass, and would fail if a step has several",
            "set train.max_micro_batch to a number, or ddp.static_graph to false",
        )
    if settings.ddp.static_graph and accumulation > 1:
        images = settings.train.batch_size // num_processes
        raise SettingsError(
            f"ddp.static_graph is set and a step has {accumulation} micro-batches, because each of the {num_processes} "
            f"processes has {images} images of it and train.max_micro_batch is {settings.train.max_micro_batch}",
            "DDP records a static graph in the first backward pass, and fails if that pass sends no gradients",
            f"set train.max_micro_batch to {images} or more, use more processes, or set ddp.static_graph to false",
        )
