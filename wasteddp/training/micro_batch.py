"""Chooses the micro-batch size for train.max_micro_batch: 0, when a run starts; checkpoints keep it.

BatchNorm computes its statistics over a micro-batch, so the size affects the result: a resumed run uses the size with
which it started, not the size that would fit now. The global batch, and so the schedule, stays as set; the number of
accumulated micro-batches follows.

On a GPU the size is found by bisection over the divisors of a process's share of the global batch. Each try is a
forward and a backward pass of the run's objective at its largest image size, on copies of the weights, with as much
other memory allocated as the optimizer, the loader and a reserve will take. The result is the largest size that fits on
every rank. On a CPU, where memory is seldom the limit, it is the largest divisor up to
`startup.MOST_UNTRIED`, without a try.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from wasteddp.data.batch import Batch
from wasteddp.errors import DeviceMemoryError
from wasteddp.order.plan import micro_batch
from wasteddp.settings import Settings
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.objective import Objective
from wasteddp.training.optimizers import ONE_MOMENT

_RESERVE = 0.1  # of the GPU's memory: fragmentation, larger cuDNN workspaces, gradient buckets
_BATCHES_AHEAD = 2  # uint8 batches of a rank's share on the GPU: the current one and the next


def choose_size(
    settings: Settings, runtime: Runtime, objective: Objective, model: nn.Module, progress: Progress
) -> tuple[Runtime, Progress]:
    """Return the runtime and the progress with the chosen micro-batch size, after a checkpoint is restored. All ranks.

    Both are returned unchanged unless train.max_micro_batch is 0. Objects that already hold the old runtime may keep
    it: only the loop uses the size.

    Args:
        model: not wrapped, with autocast as Accelerate prepares it; it is not changed.

    Raises:
        DeviceMemoryError: on every rank: not even one image fits.
    """
    if settings.train.max_micro_batch:
        return runtime, progress
    share = runtime.micro_batch * runtime.accumulation
    if progress.micro_batch:
        size = progress.micro_batch
        reason = "as when the run started"
        if share % size:
            reason = f"the run started with {size}, which does not divide {share}: other BatchNorm groups from here on"
    elif runtime.device.type == "cuda":
        runtime.watch.at("trying how many images fit", slow=True)
        largest = partial(
            attempt,
            runtime=runtime,
            objective=objective,
            model=model,
            image_size=settings.data.image_size,
            optimizer=settings.optimizer.name,
        )
        fits = partial(_fits, attempt=largest, device=runtime.device)
        size = min(runtime.gather(most_that_fit(share, fits)))  # all ranks
        if not size:
            raise _nothing_fits(settings.model.arch, settings.data.image_size)
        reason = f"the most of {share} that fit on every GPU with {_RESERVE:.0%} of its memory to spare"
    else:
        size, reason = runtime.micro_batch, runtime.micro_batch_reason
    fitting, accumulation = micro_batch(
        global_batch=settings.train.batch_size, world_size=runtime.world_size, max_micro_batch=size
    )
    runtime = replace(runtime, micro_batch=fitting, accumulation=accumulation, micro_batch_reason=reason)
    return runtime, replace(progress, micro_batch=size)


def most_that_fit(images: int, fits: Callable[[int], bool]) -> int:
    """Return the largest divisor of `images` that `fits`; 0 if there is no such divisor. `fits` must be monotonic."""
    divisors = [size for size in range(1, images + 1) if images % size == 0]
    number = bisect_left(divisors, True, key=lambda size: not fits(size))
    return divisors[number - 1] if number else 0


def _fits(size: int, attempt: Callable[[int], None], device: torch.device) -> bool:
    fits = True
    try:
        attempt(size)
    except torch.OutOfMemoryError:
        fits = False
    # after the handler: the error references the frames of the attempt, and so its tensors
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # memory/peak_mb must not include the attempts
    return fits


def attempt(
    size: int, runtime: Runtime, objective: Objective, model: nn.Module, *, image_size: int, optimizer: str
) -> None:
    """Run a step with `size` images in a micro-batch on this rank, in the memory that it will have, without effects.

    It does not use DDP: a rank that runs out of memory would leave the others in a collective. It uses copies of the
    weights, because DDP's hooks on the original weights count their backward passes.

    Args:
        image_size: the largest of the run.
        optimizer: its name.

    Raises:
        torch.OutOfMemoryError: the micro-batch does not fit.
    """
    device, side = runtime.device, image_size
    share = runtime.micro_batch * runtime.accumulation
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    kept = [torch.empty(int(_RESERVE * total) + _BATCHES_AHEAD * share * 3 * side**2, dtype=torch.uint8, device=device)]
    weights = {
        name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in model.named_parameters()
    }
    if optimizer not in ONE_MOMENT:  # the copies of the weights take the place of the first moment
        kept += [torch.empty_like(tensor) for tensor in weights.values()]
    gradients = [torch.empty_like(tensor) for tensor in weights.values()]  # of the previous step
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    images = torch.zeros((size, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)  # channels-last, as the loader's
    samples = np.arange(size, dtype=np.int64)
    batch = Batch(0, 0, images, torch.zeros(size, dtype=torch.int64), samples, samples, ())
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # it would wait for the other ranks; `begin_step` restores the training mode
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with generators, torch.compiler.set_stance("force_eager"):  # compiling each size would take minutes
        images_BCHW, targets = objective.inputs(batch, 0)
        logits_BK = functional_call(model, {**weights, **buffers}, (images_BCHW,))
        loss = objective.loss(logits_BK, targets)
        gradients.clear()
        torch.autograd.backward(loss)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _nothing_fits(arch: str, image_size: int) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"a GPU has too little memory to train {arch} on one image of {image_size} px "
        f"with {_RESERVE:.0%} of the memory in reserve",
        "no micro-batch would fit",
        "lower data.image_size, use a smaller model.arch, or stop other programs on the GPU (see nvidia-smi)",
    )
