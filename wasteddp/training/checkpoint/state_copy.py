"""Copies the state of a run at the step of a save, for the thread that writes checkpoints.

CPU, or a GPU that lacks memory for a second state:  state -> host             the loop waits
GPU:                                                 state -> device -> host   the loop launches the first copy and
                                                                               continues; the thread waits for both
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from wasteddp.training.checkpoint.reader import State, States

_ALIGNED_BYTES = 256  # alignment of a tensor in the copy: a multiple of each type's size and of the GPU's widest load
_KEPT_FREE = 0.05  # of the GPU's memory, after the allocation of the copy, for larger images and cuDNN's workspaces

Flat = dict[tuple[str, str], torch.Tensor]  # by (state's name, tensor's name)
Fetch = Callable[[], dict[str, State]]


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
