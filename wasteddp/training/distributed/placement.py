"""How a network lies on the devices: memory format, BatchNorm over the ranks, compiled; and what torch cannot do."""

from __future__ import annotations

import torch
from torch import nn

from wasteddp.errors import SettingsError
from wasteddp.settings import Model, Settings

_MOST_GRAPHS = 64  # that torch.compile makes of one network


def place(model: nn.Module, settings: Model, *, device: torch.device, world_size: int, compiles: bool) -> nn.Module:
    """The same network, on the device and as it is used; before hooks are set on its BatchNorm, and before DDP.

    Compiled is its call, in place and inside DDP, at the first call: with the hooks and the autocast that come before
    that. As around DDP, torch cuts the graph where a bucket of gradients is full, so that it is sent while the next is
    computed; but the network stays itself, and no wrapper's prefix gets into its names.
    """
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    if settings.sync_batchnorm and world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if compiles:
        compile_in_place(model)
    return model


def compile_in_place(model: nn.Module) -> None:
    # a graph for each size of images and each unfrozen stage; after the limit, of 8, torch compiles no more
    torch._dynamo.config.cache_size_limit = max(_MOST_GRAPHS, torch._dynamo.config.cache_size_limit)
    model.compile(dynamic=False)


def refuse_impossible(settings: Settings, num_processes: int, accumulation: int, *, has_gpu: bool) -> None:
    """Before the processes meet, so that all of them end with the same message.

    Raises:
        SettingsError: what torch cannot do with so many processes.
    """
    if num_processes == 1:
        return
    if settings.model.sync_batchnorm and not has_gpu:
        raise SettingsError(
            f"model.sync_batchnorm is set and the {num_processes} processes have no GPU",
            "torch's SyncBatchNorm takes no tensors of a CPU: the first step would fail",
            "set model.sync_batchnorm to false, or train on GPUs",
        )
    if settings.ddp.static_graph and not settings.train.max_micro_batch:
        raise SettingsError(
            "ddp.static_graph is set and train.max_micro_batch is 0: the micro-batch that fits is found later",
            "DDP learns a static graph in the first backward pass, and fails if a step turns out to have several",
            "set train.max_micro_batch to a number, or ddp.static_graph to false",
        )
    if settings.ddp.static_graph and accumulation > 1:
        images = settings.train.batch_size // num_processes
        raise SettingsError(
            f"ddp.static_graph is set and a step has {accumulation} micro-batches, since each of the {num_processes} "
            f"processes has {images} images of it and train.max_micro_batch is {settings.train.max_micro_batch}",
            "DDP learns a static graph in the first backward pass, and fails where that one sends no gradients",
            f"set train.max_micro_batch to {images} or more, take more processes, or set ddp.static_graph to false",
        )
