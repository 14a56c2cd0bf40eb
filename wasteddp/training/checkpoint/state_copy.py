"""Copies a run's state for the thread that writes checkpoints, as it is at the step of the save.

CPU, or a GPU that lacks memory for a second state:  state -> host             the loop waits
GPU:                                                 state -> device -> host   the loop launches the first copy and
                                                                               goes on; the thread waits for the second
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from wasteddp.training.checkpoint.reader import State, States

_ALIGNED_BYTES = 256  # where a tensor begins in the copy: a multiple of each type's size, and of the GPU's widest load
_KEPT_FREE = 0.05  # of the GPU's memory, after the copy was allocated: larger images and cuDNN's workspaces follow

Flat = dict[tuple[str, str], torch.Tensor]  # by (state's name, tensor's name)
Fetch = Callable[[], dict[str, State]]


class HostCopy:
    """Host memory for the tensors of a run, kept from one save to the next.

    Fresh memory would cost a page fault for every 4 KB, more than the copying itself. The copies lie in memory as the
    tensors do (channels-last stays so): reordering them is left to the thread that writes.
    """

    def __init__(self) -> None:
        self._copies: dict[str, State] = {}

    def of(self, states: States) -> dict[str, State]:
        """The copies, whole on return; they are overwritten by the next call."""
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
        # what is not there any more, such as the state of an optimizer that was made again, must not be saved
        return {name: {key: self._copies[name][key] for key in state} for name, state in states.items()}


class Gpu:
    """What `DeviceCopy` asks of CUDA; the tests put a device of their own in its place."""

    def __init__(self) -> None:
        self._side: torch.cuda.Stream | None = None

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def memory(self) -> tuple[int, int]:
        """(free, all) bytes of the current device. What torch has cached counts as taken: training needs it again."""
        return torch.cuda.mem_get_info()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] on the current device."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cuda")

    def allocate_on_host(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], page-locked."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Any:
        """An event after all that was launched so far."""
        return torch.cuda.current_stream().record_event()

    def fetch(self, source: torch.Tensor, target: torch.Tensor, launched: Any) -> None:
        """In the writer's thread: waits for the event, then for the copy to the host, while the training goes on."""
        if self._side is None:
            self._side = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._side):
            self._side.wait_event(launched)
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # sleeps instead of polling
            done.record(self._side)
        done.synchronize()


class DeviceCopy:
    """One piece of device memory for a second state, and one of page-locked memory on the host, kept for all saves.

    In one piece, the 480 tensors of a ResNet50 with momentum take a few launches and one copy to the host.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._layout: list[Any] = []
        self._copies: Flat = {}  # parts of what is on the device
        self._copies_on_host: Flat = {}
        self._on_device: torch.Tensor | None = None
        self._on_host: torch.Tensor | None = None

    def make_room(self, tensors: Flat) -> str:
        """Allocates the copy on the device, unless it is there.

        Returns:
            Why that is not possible, or "".
        """
        layout = [(key, tensor.shape, tensor.dtype) for key, tensor in tensors.items()]
        if self._on_device is not None and layout == self._layout:
            return ""
        num_bytes = sum(_aligned(tensor.nbytes) for tensor in tensors.values())
        if self._on_device is None or len(self._on_device) < num_bytes:
            self._copies, self._on_device = {}, None
            free, total = self._gpu.memory()
            if free - num_bytes < _KEPT_FREE * total:
                return f"{free / 1e6:,.0f} MB are free, and a second state takes {num_bytes / 1e6:,.0f} MB"
            try:
                self._on_device = self._gpu.allocate(num_bytes)
            except torch.OutOfMemoryError as error:
                return str(error).partition("\n")[0]
        self._copies, self._copies_on_host, self._layout = _views(self._on_device, tensors), {}, layout
        return ""

    @torch.no_grad()
    def launch(self, tensors: Flat) -> Any:
        """Launches the copy on the device, after `make_room`. Returns the event that `fetch` takes."""
        by_dtype: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for key, tensor in tensors.items():  # lists of two types would be copied tensor by tensor
            copies, sources = by_dtype.setdefault(tensor.dtype, ([], []))
            copies.append(self._copies[key])
            sources.append(tensor)
        for copies, sources in by_dtype.values():
            torch._foreach_copy_(copies, sources)
        return self._gpu.mark()

    def fetch(self, launched: Any) -> Flat:
        """In the writer's thread: the copies on the host, as often as asked for until the next `launch`.

        Page-locking takes long (180 ms for 188 MB): that is left to this thread too.
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
    """Copies of the state of a run, from save to save.

    Args:
        say: takes a line if the loop has to wait because the GPU lacks memory; once.
        gpu: see `Gpu`.
    """

    def __init__(self, say: Callable[[str], object], gpu: Gpu | None = None) -> None:
        self._say, self._gpu = say, gpu or Gpu()
        self._host, self._device = HostCopy(), DeviceCopy(self._gpu)
        self._has_said = False

    def begin(self, states: States) -> Fetch:
        """In the loop's thread, on return of which the states may change. The thread that writes calls what is
        returned, before the next `begin`, and gets the copies: they are overwritten by the next one."""
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
            self._say(f"the training waits for each checkpoint's copy to the host: {lacking}")
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
    """Parts of `memory`, uint8, with the types, the shapes and the order in memory that the tensors have."""
    views, begin = {}, 0
    for key, tensor in tensors.items():
        part = memory[begin : begin + tensor.nbytes].view(tensor.dtype)
        views[key] = part.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())
        begin += _aligned(tensor.nbytes)
    return views
