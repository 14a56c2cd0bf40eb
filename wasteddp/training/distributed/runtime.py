"""The processes of a run: devices, precision, threads, and how the ranks agree.

The one place that knows Accelerate's traps: they are in the comments, each seen with accelerate 1.15.
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
from wasteddp.errors import LaunchError, WastedError
from wasteddp.order.plan import micro_batch
from wasteddp.parallel import num_usable_cores, usable_cores
from wasteddp.settings import Ddp, Settings
from wasteddp.training.distributed import determinism, placement, precision
from wasteddp.training.distributed.precision import NOTHING_KEPT, Kept
from wasteddp.training.watchdog import slurm
from wasteddp.training.watchdog.watchdog import SLOW_FACTOR, Watchdog

MOST_UNTRIED = 64  # images in a micro-batch, where train.max_micro_batch says none and none is tried (`fitting`)


@dataclass(frozen=True, slots=True)
class Runtime:
    """What one process knows about itself and the others."""

    accelerator: Accelerator
    rank: int
    world_size: int
    device: torch.device
    precision: str
    precision_reason: str
    threads: int
    micro_batch: int
    accumulation: int
    control: Any  # a gloo group or None, for a few bytes between the hosts: never waits for a GPU's queue
    watch: Watchdog
    cores: int = 1  # this process's share of the machine's
    kept: Kept = NOTHING_KEPT
    images_per_s: float = 0.0  # of forward and backward passes here, not compiled; 0: not measured
    compiles: bool = False  # the network; see `compilation`
    compile_reason: str = ""
    micro_batch_reason: str = ""  # where the settings leave it open
    sent_in_order: torch.dtype | None = None  # of the gradients, with run.deterministic; None: DDP's all-reduce

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """cpu, mps, or cuda with the name of the card."""
        kind = self.device.type
        return f"{kind} ({torch.cuda.get_device_name(self.device)})" if kind == "cuda" else kind

    @contextmanager
    def together(self, doing: str = "preparing or saving") -> Iterator[None]:
        """All ranks: a `WastedError` of any rank inside the block is raised on every rank at its end.

        Without it the rank that fails leaves and the others wait in their next collective until they are stopped.
        The block itself must hold no collective, and may take long.
        """
        error: WastedError | None = None
        self.watch.at(doing, slow=True)
        try:
            yield
        except WastedError as caught:
            error = caught
        self.raise_together(error)

    def raise_together(self, error: WastedError | None) -> None:
        """All ranks: raises the first rank's error that there is, on every rank."""
        if error and self.world_size > 1:
            error.add_note(self.watch.whereabouts)
        for found in self.gather(error):  # all ranks
            if found is not None:
                raise found

    def gather(self, value: Any) -> list[Any]:
        """All ranks: the small picklable values of all, by rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        before = self.watch.meet()
        dist.all_gather_object(values, value, group=self.control)
        self.watch.met(before)
        return values

    def totals(self, *counts: int) -> list[int]:
        """All ranks: the sum of each count over the ranks."""
        return self.begin_totals(*counts)()

    def begin_totals(self, *counts: int) -> Callable[[], list[int]]:
        """All ranks: `totals`, begun. What is returned waits until all ranks have begun theirs."""
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
        """Rank 0 prints, before there is a tracker that also keeps it."""
        if self.is_main:
            print(message, flush=True)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks: the sum over the ranks."""
        if self.world_size == 1:
            return tensor
        before = self.watch.meet()
        total: torch.Tensor = self.accelerator.reduce(tensor, "sum")
        self.watch.met(before)
        return total

    def average_(self, tensors: list[torch.Tensor]) -> None:
        """All ranks: replaces the tensors by their mean over the ranks, in one message."""
        if self.world_size == 1 or not tensors:
            return
        before = self.watch.meet()
        flat = self.stack(torch.cat([tensor.reshape(-1) for tensor in tensors])).mean(0)  # in the order of the ranks
        self.watch.met(before)
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def stack(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks: the ranks' tensors, of one shape on all: [R, ...]."""
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def load_scaler(self, state: Mapping[str, float] | None) -> None:
        """The loss scale of fp16, where there is one."""
        if self.accelerator.scaler and state:
            self.accelerator.scaler.load_state_dict(dict(state))

    def micro_batches(self, batch: Batch, ddp: nn.Module) -> Iterator[Batch]:
        """All ranks: the micro-batches of a rank's batch. The backward pass of the last one averages the gradients over
        the ranks, once for all."""
        *earlier, last = batch.split(self.micro_batch)
        for micro in earlier:
            with self.accelerator.no_sync(ddp):
                yield micro
        yield last

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """All ranks: the model under DDP and autocast, with rank 0's weights; the optimizer after the loss scale."""
        with warnings.catch_warnings():
            # torch 2.14 has another name for broadcast_buffers; accelerate 1.15 and torch 2.11 know only this one
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            ddp, stepper = self.accelerator.prepare(model, optimizer)
        if self.sent_in_order and self.world_size > 1:
            determinism.add_in_order(ddp, self.sent_in_order)
        return ddp, stepper

    def close(self) -> None:
        self.accelerator.end_training()


def start(settings: Settings, watch: Watchdog | None = None, kept: Kept = NOTHING_KEPT) -> Runtime:
    """All ranks: joins the process group, chooses device, precision and threads, and solves the micro-batch.

    Args:
        watch: is told where this rank is.
        kept: what the checkpoint says that this run goes on from. Rank 0's is that of all.

    Raises:
        LaunchError: a world that Accelerate does not see, or a precision that the device cannot do.
        SettingsError: a global batch that the number of processes does not divide; what torch cannot do with so many.
    """
    slurm.refuse_other_world(os.environ)
    in_order = settings.run.deterministic
    if in_order:
        determinism.demand(compiles=settings.model.compile is True)  # before anything is computed on a GPU
    launched = environment.launched("WORLD_SIZE", 1)
    is_gpu = has_gpu()
    precision.refuse_impossible(settings.precision, has_gpu=is_gpu)
    # Solved before the group is joined: a wrong number of processes then ends at once, everywhere.
    asked = settings.train.max_micro_batch
    micro, accumulation = micro_batch(
        global_batch=settings.train.batch_size, world_size=launched, max_micro_batch=asked or MOST_UNTRIED
    )
    placement.refuse_impossible(settings, launched, accumulation, has_gpu=is_gpu)
    # Longer than the watchdog waits, which can say more than that a collective timed out.
    timeout = timedelta(seconds=60 + 1.2 * SLOW_FACTOR * settings.run.timeout_s)
    processes = _join(launched, is_gpu, timeout)
    if processes.num_processes != launched:
        raise LaunchError(
            f"the launcher started {launched} processes and Accelerate sees {processes.num_processes}",
            "each process would train its own model on all of the data, and the last to save would win",
            "on a CPU, launch with `--config_file launch/accelerate/cpu2.yaml`; on GPUs, with `--multi_gpu`",
        )
    control = dist.new_group(backend="gloo", timeout=timeout) if launched > 1 else None
    watch = watch or Watchdog()
    watch.at("measuring what is faster", slow=True)
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
        compiles=settings.model.compile is True,  # auto is decided when it is known how long the run is
        micro_batch_reason="" if asked else f"the largest part up to {MOST_UNTRIED}; what fits is tried on CUDA only",
        sent_in_order={"none": torch.float32, "bf16": torch.bfloat16}[compression] if in_order else None,
    )
    threads, cores = _use_cores(settings.run.threads, world)  # all ranks
    return replace(world, threads=threads, cores=cores)


def has_gpu() -> bool:
    """Whether a training would use a GPU: there is one, and the launch configuration does not say `use_cpu`."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def _join(launched: int, is_gpu: bool, timeout: timedelta) -> PartialState:
    try:
        return PartialState(cpu=_is_on_cpu(is_gpu), timeout=timeout)
    except ValueError as error:
        raise LaunchError(
            f"the {launched} processes that were launched cannot be joined: {error}",
            "each would wait for the others",
            "start them with `accelerate launch` or `torchrun`, which set the variables named",
        ) from error


def _is_on_cpu(is_gpu: bool) -> bool:
    """For `cpu=`: without it each process of a launch without a GPU believes that it is alone.

    `use_cpu` of a launch configuration sets the variable, which PartialState does not read.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (not is_gpu and not torch.backends.mps.is_available())


def _agreed_precision(
    settings: Settings, processes: PartialState, control: Any, kept: Kept
) -> tuple[Kept, precision.Precision]:
    """All ranks: what rank 0 keeps and measures. Before the accelerator is made, which is told the precision."""
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
            # Rank 0's BatchNorm statistics would otherwise be sent to all in each forward, the others' lost.
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
    """All ranks: CPU threads of this process, and its cores.

    `accelerate launch` sets OMP_NUM_THREADS=1: one core of many would work.

    Ranks of a machine share the cores that several of them may use. Those that something pins (`srun --cpu-bind`,
    `numactl`) have their own. Ranks are not pinned here: on two cores that made no difference (docs/notes.md).
    """
    machine, cores = socket.gethostname(), usable_cores()
    sharing = sum(name == machine and not cores.isdisjoint(others) for name, others in world.gather((machine, cores)))
    own = max(1, num_usable_cores() // sharing)
    torch.set_num_threads(asked or own)
    return asked or own, own
