"""Starts the processes of a run: joins them, and chooses the precision, the threads and the micro-batch.

Ranks with other settings, code or versions than rank 0 are refused: their training would run to its end, since DDP
averages gradients, whatever they are gradients of.

This module sets up Accelerate. Comments note its pitfalls, each seen with accelerate 1.15.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, parse_flag_from_env

from wasteddp import __version__, environment
from wasteddp.errors import LaunchError, SettingsError, WastedError
from wasteddp.order.plan import micro_batch
from wasteddp.parallel import num_usable_cores, usable_cores
from wasteddp.settings import Ddp, Model, Settings, Train, leaves
from wasteddp.training.distributed import determinism, precision
from wasteddp.training.distributed.precision import NOTHING_KEPT, Kept
from wasteddp.training.distributed.runtime import Runtime, has_gpu, refuse_different
from wasteddp.training.watchdog import slurm
from wasteddp.training.watchdog.watchdog import SLOW_FACTOR, Watchdog

MOST_UNTRIED = 64  # images in a micro-batch, if train.max_micro_batch is 0 and no size is tried (`micro_batch`)
# Settings that may differ between machines: they name a place or a number of cores of this machine.
_OF_A_MACHINE = ("run.threads", "data.shards", "data.staged", "data.cache", "data.cache_gb", "data.workers")


def start_runtime(settings: Settings, watch: Watchdog | None = None, kept: Kept = NOTHING_KEPT) -> Runtime:
    """Join the process group, choose device, precision and threads, and compute the micro-batch. All ranks.

    Args:
        watch: receives the position of this rank.
        kept: choices from the checkpoint that this run resumes from. All ranks use those of rank 0.

    Raises:
        LaunchError: Accelerate does not see all processes, or the device does not support the precision.
        SettingsError: the number of processes does not divide the global batch, or torch does not support the settings.
    """
    slurm.refuse_other_world(os.environ)
    in_order = settings.run.deterministic
    if in_order:
        determinism.demand(compiles=settings.model.compile is True)  # before anything is computed on a GPU
    launched = environment.launched("WORLD_SIZE", 1)
    is_gpu = has_gpu()
    precision.refuse_impossible(settings.precision, has_gpu=is_gpu)
    # Before the group is joined: a wrong number of processes then ends all of them immediately.
    asked = settings.train.max_micro_batch
    micro, accumulation = micro_batch(
        global_batch=settings.train.batch_size, world_size=launched, max_micro_batch=asked or MOST_UNTRIED
    )
    refuse_impossible(settings.model, settings.ddp, settings.train, launched, accumulation, has_gpu=is_gpu)
    # Longer than the watchdog waits, because its message says more than a collective's timeout.
    timeout = timedelta(seconds=60 + 1.2 * SLOW_FACTOR * settings.run.timeout_s)
    processes = _join(launched, is_gpu, timeout)
    if processes.num_processes != launched:
        raise LaunchError(
            f"the launcher started {launched} processes and Accelerate sees {processes.num_processes}",
            "each process would train its own model on all of the data and overwrite the other's checkpoints",
            "on a CPU, launch with `--config_file launch/accelerate/cpu2.yaml`; on GPUs, with `--multi_gpu`",
        )
    control = dist.new_group(backend="gloo", timeout=timeout) if launched > 1 else None
    _refuse_different_starts(facts_of(settings), launched, control)  # all ranks
    watch = watch or Watchdog()
    watch.at("measuring precisions", slow=True)
    kept, chosen = _agreed_precision(settings, processes, control, kept)  # all ranks
    compression = settings.ddp.compression
    hook = DDPCommunicationHookType("no" if in_order else compression.replace("none", "no"))
    accelerator = _accelerator(chosen.name, is_gpu, settings.ddp, hook)
    runtime = Runtime(
        accelerator=accelerator,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        precision=chosen.name,
        precision_reason=chosen.reason,
        threads=1,
        micro_batch=micro,
        accumulation=accumulation,
        control=control,
        watch=watch,
        kept=kept,
        images_per_s=chosen.images_per_s.get(chosen.name, 0.0),
        compiles=settings.model.compile is True,  # auto is decided in `compilation.choose`, which needs the plan
        micro_batch_reason="" if asked else f"the largest divisor up to {MOST_UNTRIED}; sizes are tried on CUDA only",
        sent_in_order={"none": torch.float32, "bf16": torch.bfloat16}[compression] if in_order else None,
    )
    threads, cores = _use_cores(settings.run.threads, runtime)  # all ranks
    return replace(runtime, threads=threads, cores=cores)


def refuse_impossible(
    model: Model, ddp: Ddp, train: Train, num_processes: int, accumulation: int, *, has_gpu: bool
) -> None:
    """Refuse settings that torch does not support, before the processes join: all of them end with the same message.

    Raises:
        SettingsError: torch does not support the settings with this number of processes.
    """
    if num_processes == 1:
        return
    if model.sync_batchnorm and not has_gpu:
        raise SettingsError(
            f"model.sync_batchnorm is set and the {num_processes} processes have no GPU",
            "torch's SyncBatchNorm does not support CPU tensors: the first step would fail",
            "set model.sync_batchnorm to false, or train on GPUs",
        )
    if ddp.static_graph and not train.max_micro_batch:
        raise SettingsError(
            "ddp.static_graph is set and train.max_micro_batch is 0, so the micro-batch size is found later",
            "DDP records a static graph in the first backward pass, and would fail if a step has several",
            "set train.max_micro_batch to a number, or ddp.static_graph to false",
        )
    if ddp.static_graph and accumulation > 1:
        images = train.batch_size // num_processes
        raise SettingsError(
            f"ddp.static_graph is set and a step has {accumulation} micro-batches, because each of the {num_processes} "
            f"processes has {images} images of it and train.max_micro_batch is {train.max_micro_batch}",
            "DDP records a static graph in the first backward pass, and fails if that pass sends no gradients",
            f"set train.max_micro_batch to {images} or more, use more processes, or set ddp.static_graph to false",
        )


def facts_of(settings: Settings) -> dict[str, object]:
    """Return the settings by their dotted names, the versions, and a hash of the package's code."""
    found = {key: value for key, value in leaves(settings.model_dump(mode="json")) if key not in _OF_A_MACHINE}
    return {**found, "wasteddp": __version__, "torch": str(torch.__version__), "the code's hash": _hash_of_code()}


def hash_of_facts(facts: Mapping[str, object]) -> str:
    """Return the sha256 of `facts`, for a first comparison of thousands of ranks."""
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def _hash_of_code() -> str:
    package, digest = Path(__file__).parents[2], sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _join(launched: int, is_gpu: bool, timeout: timedelta) -> PartialState:
    try:
        return PartialState(cpu=_is_on_cpu(is_gpu), timeout=timeout)
    except ValueError as error:
        raise LaunchError(
            f"the {launched} processes that were launched cannot be joined: {error}",
            "each process would wait for the others",
            "start them with `accelerate launch` or `torchrun`, which set these variables",
        ) from error


def _refuse_different_starts(facts: Mapping[str, object], launched: int, control: Any) -> None:
    """Raise a LaunchError if a rank has other settings, code or versions than rank 0. All ranks."""
    if control is None:
        return
    digests: list[Any] = [None] * launched
    dist.all_gather_object(digests, hash_of_facts(facts), group=control)
    if len(set(digests)) == 1:
        return
    found: list[Any] = [None] * launched
    dist.all_gather_object(found, facts, group=control)  # on all ranks, since all have the same digests
    refuse_different(found, "start every rank with the same command, configuration file and version of wasteddp")


def _is_on_cpu(is_gpu: bool) -> bool:
    """Return the argument `cpu` of Accelerate. Without it each process of a launch without a GPU forms its own world.

    `use_cpu` of a launch configuration sets a variable that PartialState does not read.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (not is_gpu and not torch.backends.mps.is_available())


def _agreed_precision(
    settings: Settings, processes: PartialState, control: Any, kept: Kept
) -> tuple[Kept, precision.Precision]:
    """Return the kept choices and the precision of rank 0, before the accelerator is created. All ranks.

    Raises:
        SettingsError, LaunchError: on every rank: the precision or the image size cannot be used.
    """
    answer: list[Any] = [None]
    if processes.process_index == 0:
        try:
            chosen = precision.choose(
                settings.precision,
                has_gpu=processes.device.type == "cuda",
                kept=kept,
                measure=partial(
                    precision.measure,
                    settings.model,
                    processes.device,
                    image_size=settings.data.image_size,
                    max_micro_batch=settings.train.max_micro_batch,
                ),
                may_measure=not settings.run.deterministic,
                is_speed_asked=settings.model.compile == "auto" and kept.compiles is None,
            )
            answer = [(kept, chosen)]
        except WastedError as error:
            answer = [error]
    if control is not None:
        dist.broadcast_object_list(answer, src=0, group=control)
    if isinstance(answer[0], WastedError):
        raise answer[0]
    kept, chosen = answer[0]
    return kept, chosen


def _accelerator(precision: str, has_gpu: bool, ddp: Ddp, hook: DDPCommunicationHookType) -> Accelerator:
    return Accelerator(
        cpu=_is_on_cpu(has_gpu),
        mixed_precision={"fp32": "no"}.get(precision, precision),
        kwargs_handlers=[
            # Otherwise each forward pass would overwrite the BatchNorm statistics of all ranks by those of rank 0.
            DistributedDataParallelKwargs(
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=ddp.bucket_mb,
                static_graph=ddp.static_graph,
                comm_hook=hook,
            ),
        ],
    )


def _use_cores(asked: int, runtime: Runtime) -> tuple[int, int]:
    """Set the number of CPU threads, and return it with the number of cores of this process. All ranks.

    `accelerate launch` sets OMP_NUM_THREADS=1, with which a process would use a single core.

    The ranks of a machine divide the cores that they share. A rank that is pinned to its own cores (`srun --cpu-bind`,
    `numactl`) uses those. Ranks are not pinned here: on two cores that made no difference (docs/notes.md).
    """
    machine, cores = socket.gethostname(), usable_cores()
    sharing = sum(name == machine and not cores.isdisjoint(others) for name, others in runtime.gather((machine, cores)))
    own = max(1, num_usable_cores() // sharing)
    torch.set_num_threads(asked or own)
    return asked or own, own
