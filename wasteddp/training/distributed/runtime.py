"""The processes of a run: process group, device, precision, threads, and collectives.

This module sets up Accelerate. Comments note its pitfalls, each seen with accelerate 1.15.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, parse_flag_from_env
from torch import nn

from wasteddp import environment
from wasteddp.data.batch import Batch
from wasteddp.errors import LaunchError, WastedError, print_line
from wasteddp.order.plan import micro_batch
from wasteddp.parallel import num_usable_cores, usable_cores
from wasteddp.settings import Ddp, Settings
from wasteddp.training.distributed import determinism, placement, precision, same_ranks
from wasteddp.training.distributed.precision import NOTHING_KEPT, Kept
from wasteddp.training.watchdog import slurm
from wasteddp.training.watchdog.watchdog import SLOW_FACTOR, Watchdog

MOST_UNTRIED = 64  # images in a micro-batch, if train.max_micro_batch is 0 and no size is tried (`micro_batch`)


@dataclass(frozen=True, slots=True)
class Runtime:
    """The view that one process has of itself and the other ranks."""

    accelerator: Accelerator
    rank: int
    world_size: int
    device: torch.device
    precision: str
    precision_reason: str
    threads: int
    micro_batch: int
    accumulation: int
    control: Any  # a gloo group for small messages between the hosts, which never wait for a GPU; None with one rank
    watch: Watchdog
    cores: int = 1  # this process's share of the machine
    kept: Kept = NOTHING_KEPT
    images_per_s: float = 0.0  # of forward and backward passes in this process, not compiled; 0: not measured
    compiles: bool = False  # whether the network is compiled, see `compilation`
    compile_reason: str = ""
    micro_batch_reason: str = ""  # with train.max_micro_batch 0
    sent_in_order: torch.dtype | None = None  # of the gradients' messages, with run.deterministic; None: all-reduce

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """cpu, mps, or cuda with the name of the GPU."""
        kind = self.device.type
        return f"{kind} ({torch.cuda.get_device_name(self.device)})" if kind == "cuda" else kind

    @contextmanager
    def together(self, doing: str = "preparing or saving") -> Iterator[None]:
        """Raise a `WastedError` of any rank inside the block on every rank, at the end of the block. All ranks.

        Otherwise the rank that fails would leave, and the others would wait in their next collective until they are
        stopped. The block must not use collectives, and may take long.
        """
        error: WastedError | None = None
        self.watch.at(doing, slow=True)
        try:
            yield
        except WastedError as caught:
            error = caught
        self.raise_together(error)

    def raise_together(self, error: WastedError | None) -> None:
        """Raise the error of the first rank that has one, on every rank. All ranks."""
        if error and self.world_size > 1:
            error.add_note(self.watch.whereabouts)
        for found in self.gather(error):  # all ranks
            if found is not None:
                raise found

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order; they must be small and picklable. All ranks."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        before = self.watch.meet()
        dist.all_gather_object(values, value, group=self.control)
        self.watch.met(before)
        return values

    def totals(self, *counts: int) -> list[int]:
        """Return the sum of each count over the ranks. All ranks."""
        return self.begin_totals(*counts)()

    def begin_totals(self, *counts: int) -> Callable[[], list[int]]:
        """Start `totals`, and return a function that waits for the result. All ranks."""
        if self.control is None:
            return lambda: list(counts)
        words = torch.tensor(counts)
        pending = dist.all_reduce(words, group=self.control, async_op=True)

        def finish() -> list[int]:
            before = self.watch.meet()
            pending.wait()
            self.watch.met(before)
            return words.tolist()

        return finish

    def say(self, message: str) -> None:
        """Print a line on rank 0, before the tracker exists, which also writes the log."""
        if self.is_main:
            print_line(message)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the ranks. All ranks."""
        if self.world_size == 1:
            return tensor
        before = self.watch.meet()
        total: torch.Tensor = self.accelerator.reduce(tensor, "sum")
        self.watch.met(before)
        return total

    def average_(self, tensors: list[torch.Tensor]) -> None:
        """Replace the tensors by their mean over the ranks, in one message. All ranks."""
        if self.world_size == 1 or not tensors:
            return
        before = self.watch.meet()
        flat = self.stack(torch.cat([tensor.reshape(-1) for tensor in tensors])).mean(0)  # in the order of the ranks
        self.watch.met(before)
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def stack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks, which must have the same shape: [R, ...]. All ranks."""
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def load_scaler(self, state: Mapping[str, float] | None) -> None:
        """Restore the loss scale of fp16, if the run uses one."""
        if self.accelerator.scaler and state:
            self.accelerator.scaler.load_state_dict(dict(state))

    def micro_batches(self, batch: Batch, ddp: nn.Module) -> Iterator[Batch]:
        """Yield the micro-batches of a rank's batch. The backward pass of the last one averages the accumulated
        gradients over the ranks. All ranks."""
        *earlier, last = batch.split(self.micro_batch)
        for micro in earlier:
            with self.accelerator.no_sync(ddp):
                yield micro
        yield last

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Return the model with DDP and autocast, with rank 0's weights, and the optimizer with the loss scale. All
        ranks."""
        with warnings.catch_warnings():
            # torch 2.14 renames broadcast_buffers; accelerate 1.15 and torch 2.11 know only the old name
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            ddp, stepper = self.accelerator.prepare(model, optimizer)
        if self.sent_in_order and self.world_size > 1:
            determinism.add_in_order(ddp, self.sent_in_order)
        return ddp, stepper

    def close(self) -> None:
        self.accelerator.end_training()


def start(settings: Settings, watch: Watchdog | None = None, kept: Kept = NOTHING_KEPT) -> Runtime:
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
    placement.refuse_impossible(settings, launched, accumulation, has_gpu=is_gpu)
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
    _refuse_different_starts(settings, launched, control)  # all ranks
    watch = watch or Watchdog()
    watch.at("measuring precisions", slow=True)
    kept, chosen = _agreed_precision(settings, processes, control, kept)  # all ranks
    compression = settings.ddp.compression
    hook = DDPCommunicationHookType("no" if in_order else compression.replace("none", "no"))
    accelerator = _accelerator(chosen.name, is_gpu, settings.ddp, hook)
    world = Runtime(
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
    threads, cores = _use_cores(settings.run.threads, world)  # all ranks
    return replace(world, threads=threads, cores=cores)


def has_gpu() -> bool:
    """Whether a training would use a GPU: there is a GPU, and the launch configuration does not set `use_cpu`."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def _join(launched: int, is_gpu: bool, timeout: timedelta) -> PartialState:
    try:
        return PartialState(cpu=_is_on_cpu(is_gpu), timeout=timeout)
    except ValueError as error:
        raise LaunchError(
            f"the {launched} processes that were launched cannot be joined: {error}",
            "each process would wait for the others",
            "start them with `accelerate launch` or `torchrun`, which set these variables",
        ) from error


def _refuse_different_starts(settings: Settings, launched: int, control: Any) -> None:
    """Raise a LaunchError if a rank has other settings, code or versions than rank 0. All ranks."""
    if control is None:
        return
    facts = same_ranks.facts(settings)
    digests: list[Any] = [None] * launched
    dist.all_gather_object(digests, same_ranks.hash_of_facts(facts), group=control)
    if len(set(digests)) == 1:
        return
    found: list[Any] = [None] * launched
    dist.all_gather_object(found, facts, group=control)  # on all ranks, since all have the same digests
    same_ranks.refuse_different(
        found, "start every rank with the same command, configuration file and version of wasteddp"
    )


def _is_on_cpu(is_gpu: bool) -> bool:
    """Return the argument `cpu` of Accelerate. Without it each process of a launch without a GPU forms its own world.

    `use_cpu` of a launch configuration sets a variable that PartialState does not read.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (not is_gpu and not torch.backends.mps.is_available())


def _agreed_precision(
    settings: Settings, processes: PartialState, control: Any, kept: Kept
) -> tuple[Kept, precision.Precision]:
    """Return the kept choices and the precision of rank 0, before the accelerator is created. All ranks."""
    answer: list[Any] = [None]
    if processes.process_index == 0:
        chosen = precision.choose(
            settings.precision,
            has_gpu=processes.device.type == "cuda",
            kept=kept,
            measure=partial(precision.measure, settings, processes.device),
            may_measure=not settings.run.deterministic,
            is_speed_asked=settings.model.compile == "auto" and kept.compiles is None,
        )
        answer = [(kept, chosen)]
    if control is not None:
        dist.broadcast_object_list(answer, src=0, group=control)
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


def _use_cores(asked: int, world: Runtime) -> tuple[int, int]:
    """Set the number of CPU threads, and return it with the number of cores of this process. All ranks.

    `accelerate launch` sets OMP_NUM_THREADS=1, with which a process would use a single core.

    The ranks of a machine divide the cores that they share. A rank that is pinned to its own cores (`srun --cpu-bind`,
    `numactl`) uses those. Ranks are not pinned here: on two cores that made no difference (docs/notes.md).
    """
    machine, cores = socket.gethostname(), usable_cores()
    sharing = sum(name == machine and not cores.isdisjoint(others) for name, others in world.gather((machine, cores)))
    own = max(1, num_usable_cores() // sharing)
    torch.set_num_threads(asked or own)
    return asked or own, own
