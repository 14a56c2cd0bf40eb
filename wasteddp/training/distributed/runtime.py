"""The processes of a run: collectives, errors of one rank raised on all, and what Accelerate prepares."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import nn

from wasteddp.data.batch import Batch
from wasteddp.errors import LaunchError, WastedError, print_line
from wasteddp.training.distributed import determinism
from wasteddp.training.distributed.precision import NOTHING_KEPT, Kept
from wasteddp.training.watchdog.watchdog import Watchdog

_MOST_NAMED = 5


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
    def sharing_errors(self, doing: str = "preparing or saving") -> Iterator[None]:
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
        before = self.watch.enter_collective()
        dist.all_gather_object(values, value, group=self.control)
        self.watch.leave_collective(before)
        return values

    def require_equal(self, facts: Mapping[str, object], remedy: str) -> None:
        """Raise a LaunchError on every rank that names which of the facts differ between the ranks. All ranks.

        Args:
            facts: of this rank, small and with the same keys on every rank.
            remedy: what to do.
        """
        refuse_different(self.gather(facts), remedy)  # all ranks

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
            before = self.watch.enter_collective()
            pending.wait()
            self.watch.leave_collective(before)
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
        before = self.watch.enter_collective()
        total: torch.Tensor = self.accelerator.reduce(tensor, "sum")
        self.watch.leave_collective(before)
        return total

    def average_(self, tensors: list[torch.Tensor]) -> None:
        """Replace the tensors by their mean over the ranks, in one message. All ranks."""
        if self.world_size == 1 or not tensors:
            return
        before = self.watch.enter_collective()
        flat = self.stack(torch.cat([tensor.reshape(-1) for tensor in tensors])).mean(0)  # in the order of the ranks
        self.watch.leave_collective(before)
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
            ddp, scaled = self.accelerator.prepare(model, optimizer)
        if self.sent_in_order and self.world_size > 1:
            determinism.add_in_order(ddp, self.sent_in_order)
        return ddp, scaled

    def close(self) -> None:
        self.accelerator.end_training()


def has_gpu() -> bool:
    """Whether a training would use a GPU: there is a GPU, and the launch configuration does not set `use_cpu`."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def refuse_different(found: Sequence[Mapping[str, object]], remedy: str) -> None:
    """Raise a LaunchError that names what differs from rank 0, and on which rank.

    Args:
        found: of each rank, with the same keys.
        remedy: what to do.
    """
    lines = [
        f"rank {rank}: {name} is {value!r}, on rank 0 {found[0].get(name)!r}"
        for rank, of_rank in enumerate(found)
        for name, value in of_rank.items()
        if value != found[0].get(name)
    ]
    if lines:
        more = f"; and {len(lines) - _MOST_NAMED} more" if len(lines) > _MOST_NAMED else ""
        raise LaunchError(
            "the ranks of this training differ: " + "; ".join(lines[:_MOST_NAMED]) + more,
            "each would compute something else, and the mean of their gradients would be neither",
            remedy,
        )
