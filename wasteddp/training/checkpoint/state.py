"""The state of a run between two steps: networks, optimizer, and each rank's own BatchNorm statistics.

It is copied at the step of a save, for the thread that writes checkpoints.

CPU, or a GPU that lacks memory for a second state:  state -> host             the loop waits
GPU:                                                 state -> device -> host   the loop launches the first copy and
                                                                               continues; the thread waits for both

Legend: R ranks, F numbers in all running statistics of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from wasteddp.errors import CheckpointError
from wasteddp.model.networks import running_statistics
from wasteddp.training import optimizers
from wasteddp.training.checkpoint.reader import Checkpoint, State, States
from wasteddp.training.distributed.runtime import Runtime

Flat = dict[tuple[str, str], torch.Tensor]  # by (state's name, tensor's name)
Fetch = Callable[[], dict[str, State]]

_RANKS = "ranks"  # name of the state that holds each rank's own statistics
_STATISTICS = "running_statistics"
_ALIGNED_BYTES = 256  # alignment of a tensor in the copy: a multiple of each type's size and of the GPU's widest load
_KEPT_FREE = 0.05  # of the GPU's memory, after the allocation of the copy, for larger images and cuDNN's workspaces


class Stateful(Protocol):
    """Further state to save with the model and the optimizer, such as a moving average of the weights."""

    def state_dict(self) -> Mapping[str, torch.Tensor]: ...
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> Any: ...


class RunState:
    """The state of one run, on all ranks.

    Args:
        model: with or without the wrappers of DDP and `torch.compile`.
        optimizer: not as Accelerate wraps it.
        further: other objects with a state, by the name of their file; the same on every rank. If one is a network, its
            running statistics differ between the ranks, as those of the model.
    """

    def __init__(
        self, runtime: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer, further: Mapping[str, Stateful]
    ) -> None:
        self._runtime, self._optimizer, self._further = runtime, optimizer, further
        self._model: nn.Module = runtime.accelerator.unwrap_model(model, keep_torch_compile=False)
        networks = {name: thing for name, thing in further.items() if isinstance(thing, nn.Module)}
        self._networks: dict[str, nn.Module] = {"model": self._model, **networks}

    @property
    def model_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._model.state_dict().values())

    def tensors(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """Return the states of a checkpoint. All ranks.

        The networks' running statistics are the mean over the ranks, which any number of ranks can load. The state
        "ranks" holds each rank's own, so that the same number of ranks resumes bit for bit.
        """
        states: dict[str, Mapping[str, torch.Tensor]] = {
            "model": self._model.state_dict(keep_vars=True),  # detaching 320 tensors would take 0.4 ms
            "optimizer": optimizers.state_tensors(self._optimizer, self._model),
            **{name: thing.state_dict() for name, thing in self._further.items()},
        }
        if self._runtime.world_size == 1:
            return states
        of_ranks = {}
        for name, network in self._networks.items():
            if own := running_statistics(network):
                flat_RF = self._runtime.stack(torch.cat([tensor.reshape(-1) for tensor in own]))  # all ranks
                means = [torch.empty_like(tensor) for tensor in own]
                _fill(means, flat_RF.mean(0))
                names = {id(buffer): key for key, buffer in network.named_buffers()}
                states[name] = {**states[name], **{names[id(t)]: mean for t, mean in zip(own, means, strict=True)}}
                of_ranks[_own_statistics(name)] = flat_RF
        return {**states, _RANKS: of_ranks} if of_ranks else states

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the state of a checkpoint, after `Runtime.prepare`, which copies the state of rank 0 to all. All ranks.

        Raises:
            CheckpointError: on every rank: the checkpoint lacks a state that this run has.
        """
        with self._runtime.sharing_errors():
            if missing := self._further.keys() - checkpoint.states.keys():
                raise CheckpointError(
                    f"{checkpoint.path} has no state of: {', '.join(sorted(missing))}",
                    "the run would combine trained weights with a new state",
                    "restore the settings of that run, or set run.out to a new folder",
                )
        self._model.load_state_dict(checkpoint.states["model"])
        optimizers.load_state_tensors(self._optimizer, self._model, checkpoint.states["optimizer"])
        for name, thing in self._further.items():
            thing.load_state_dict(checkpoint.states[name])
        for name, network in self._networks.items():
            own = checkpoint.states.get(_RANKS, {}).get(_own_statistics(name))
            if own is not None and len(own) == self._runtime.world_size:  # another number of ranks uses the mean
                _fill(running_statistics(network), own[self._runtime.rank])
        self._runtime.load_scaler(checkpoint.progress.scaler)

    def reconcile(self) -> None:
        """Replace BatchNorm's running statistics by their mean over the ranks, which saw other images. All ranks."""
        self._runtime.average_(
            [tensor for network in self._networks.values() for tensor in running_statistics(network)]
        )


class HostCopy:
    """Host memory for the tensors of a run, reused by each save.

    New memory would cost a page fault for every 4 KB, which takes longer than the copy itself. The copies keep the
    memory format of the tensors (such as channels-last): the writer's thread reorders them.
    """

    def __init__(self) -> None:
        self._copies: dict[str, State] = {}

    def of(self, states: States) -> dict[str, State]:
        """Return the finished copies, which the next call overwrites."""
        on_gpu = False
        for name, state in states.items():
            copies = self._copies.setdefault(name, {})
            for key, tensor in state.items():
                copy = copies.get(key)
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=tensor.is_cuda)
                copies[key] = copy.copy_(tensor.detach(), non_blocking=True)
                on_gpu = on_gpu or tensor.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        # a tensor that no longer exists, such as the state of a replaced optimizer, must not be saved
        return {name: {key: self._copies[name][key] for key in state} for name, state in states.items()}


class Gpu:
    """The CUDA calls of `DeviceCopy`; tests replace them."""

    def __init__(self) -> None:
        self._side: torch.cuda.Stream | None = None

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def memory(self) -> tuple[int, int]:
        """Return (free, total) bytes of the current device. Memory cached by torch is not free: training reuses it."""
        return torch.cuda.mem_get_info()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 [num_bytes] on the current device."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cuda")

    def allocate_on_host(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 [num_bytes], page-locked."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Any:
        """Return an event after everything that was launched so far."""
        return torch.cuda.current_stream().record_event()

    def fetch(self, source: torch.Tensor, target: torch.Tensor, launched: Any) -> None:
        """Wait for the event, then for the copy to the host. In the writer's thread, while training continues."""
        if self._side is None:
            self._side = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._side):
            self._side.wait_event(launched)
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # sleeps instead of polling
            done.record(self._side)
        done.synchronize()


class DeviceCopy:
    """One block of device memory for a second state, and one of page-locked host memory, reused by all saves.

    In one block, the 480 tensors of a ResNet50 with momentum take a few launches and one copy to the host.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._layout: list[Any] = []
        self._copies: Flat = {}  # views of the device memory
        self._copies_on_host: Flat = {}
        self._on_device: torch.Tensor | None = None
        self._on_host: torch.Tensor | None = None

    def make_room(self, tensors: Flat) -> str:
        """Allocate the copy on the device, if it is not allocated yet.

        Returns:
            The reason why that is not possible, or "".
        """
        layout = [(key, tensor.shape, tensor.dtype) for key, tensor in tensors.items()]
        if self._on_device is not None and layout == self._layout:
            return ""
        num_bytes = sum(_aligned(tensor.nbytes) for tensor in tensors.values())
        if self._on_device is None or len(self._on_device) < num_bytes:
            self._copies, self._on_device = {}, None
            free, total = self._gpu.memory()
            if free - num_bytes < _KEPT_FREE * total:
                return f"the GPU has {free / 1e6:,.0f} MB free, and a second state takes {num_bytes / 1e6:,.0f} MB"
            try:
                self._on_device = self._gpu.allocate(num_bytes)
            except torch.OutOfMemoryError as error:
                return str(error).partition("\n")[0]
        self._copies, self._copies_on_host, self._layout = _views(self._on_device, tensors), {}, layout
        return ""

    @torch.no_grad()
    def launch(self, tensors: Flat) -> Any:
        """Launch the copy on the device, after `make_room`, and return the event for `fetch`."""
        by_dtype: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for key, tensor in tensors.items():  # a list of mixed types would be copied tensor by tensor
            copies, sources = by_dtype.setdefault(tensor.dtype, ([], []))
            copies.append(self._copies[key])
            sources.append(tensor)
        for copies, sources in by_dtype.values():
            torch._foreach_copy_(copies, sources)
        return self._gpu.mark()

    def fetch(self, launched: Any) -> Flat:
        """Return the copies on the host; may be called several times until the next `launch`. In the writer's thread.

        Page-locking is slow (180 ms for 188 MB), so this thread does that too.
        """
        assert self._on_device is not None
        num_bytes = len(self._on_device)
        if self._on_host is None or len(self._on_host) < num_bytes:
            self._copies_on_host, self._on_host = {}, None
            self._on_host = self._gpu.allocate_on_host(num_bytes)
        if not self._copies_on_host:
            self._copies_on_host = _views(self._on_host, self._copies)
        self._gpu.fetch(self._on_device, self._on_host[:num_bytes], launched)
        return self._copies_on_host


class StateCopy:
    """Copies the state of a run for each save.

    Args:
        say: receives a line, once, if the loop has to wait because the GPU lacks memory.
        gpu: see `Gpu`.
    """

    def __init__(self, say: Callable[[str], object], gpu: Gpu | None = None) -> None:
        self._say, self._gpu = say, gpu or Gpu()
        self._host, self._device = HostCopy(), DeviceCopy(self._gpu)
        self._has_said = False

    def begin(self, states: States) -> Fetch:
        """Start to copy the states, which may change after the call. In the loop's thread.

        Returns:
            A function that returns the copies, for the writer's thread. It must be called before the next `begin`,
            which overwrites the copies.
        """
        on_gpu: Flat = {}
        on_host: dict[str, State] = {name: {} for name in states}
        for name, state in states.items():
            for key, tensor in state.items():
                if self._gpu.holds(tensor):
                    on_gpu[name, key] = tensor
                else:
                    on_host[name][key] = tensor
        lacking = self._device.make_room(on_gpu) if on_gpu else ""
        if lacking and not self._has_said:
            self._has_said = True
            self._say(f"training waits for the copy of each checkpoint to the host: {lacking}")
        if lacking or not on_gpu:
            return partial(dict, self._host.of(states))
        order = {name: tuple(state) for name, state in states.items()}
        return partial(self._fetch, order, self._host.of(on_host), self._device.launch(on_gpu))

    def _fetch(
        self, order: Mapping[str, tuple[str, ...]], on_host: Mapping[str, State], launched: Any
    ) -> dict[str, State]:
        fetched = self._device.fetch(launched)
        return {
            name: {key: on_host[name][key] if key in on_host[name] else fetched[name, key] for key in keys}
            for name, keys in order.items()
        }


def room_for_checkpoint(model_bytes: int, *, optimizer: str, ema_decay: float) -> int:
    """Return the bytes of a checkpoint: the weights, their average, and the optimizer's moments."""
    return model_bytes * (1 + (ema_decay > 0) + (1 if optimizer in optimizers.ONE_MOMENT else 2))


def room_for_run(model_bytes: int, checkpoint_bytes: int, *, keep_last: int) -> int:
    """Return the most bytes that checkpoints and bundles take: those kept, the best, and those being written."""
    return checkpoint_bytes * (keep_last + 2) + 2 * model_bytes


def _own_statistics(name: str) -> str:
    """Return the key of the ranks' own running statistics of a network."""
    return _STATISTICS if name == "model" else f"{name}_{_STATISTICS}"


def _fill(tensors: list[torch.Tensor], flat: torch.Tensor) -> None:
    """Copy consecutive parts of `flat` into the tensors."""
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _views(memory: torch.Tensor, tensors: Flat) -> Flat:
    """Return views of `memory`, uint8, with the types, shapes and memory formats of the tensors."""
    views, begin = {}, 0
    for key, tensor in tensors.items():
        part = memory[begin : begin + tensor.nbytes].view(tensor.dtype)
        views[key] = part.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())
        begin += _aligned(tensor.nbytes)
    return views
