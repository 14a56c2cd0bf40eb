"""Memory that several processes write to. It has no name, so nothing remains after the processes end.

A memfd does not use /dev/shm, which containers limit to 64 MB, but counts as memory of the container. If the kernel or
a seccomp profile refuses it, an unlinked file in /dev/shm or in the folder for temporary files is used instead. All
pages are reserved at the start, since writing to a page that is not available would be a bus error.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.errors import SettingsError


class SharedMemory:
    """A mapping of `num_bytes`, and the descriptor with which other processes map the same memory."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.descriptor, self.kind = _reserve(num_bytes)
        self._map = mmap.mmap(self.descriptor, num_bytes)
        self._registered_at = 0

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Return a part of the memory, uint8 [num_bytes]. The mapping exists as long as one of its views does."""
        return np.frombuffer(self._map, np.uint8, num_bytes, offset)

    def register_with_cuda(self) -> bool:
        """Page-lock the memory, so that a GPU copies from it directly; return whether the driver allowed it."""
        address = self.view(0, self.num_bytes).ctypes.data
        # Source: CUDA Runtime API, cudaHostRegister; flags 0 is cudaHostRegisterDefault
        if int(_cudart().cudaHostRegister(address, self.num_bytes, 0)) != 0:
            return False
        self._registered_at = address
        return True

    def close(self) -> None:
        """Close the descriptor. The pages are freed after the last view is deleted."""
        if self._registered_at:
            import torch

            torch.cuda.synchronize()  # a copy from the memory may be in progress
            _cudart().cudaHostUnregister(self._registered_at)
            self._registered_at = 0
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _cudart() -> Any:
    import torch  # imported here, since the rest of the module does not need it

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def map_shared(descriptor: int, num_bytes: int) -> mmap.mmap:
    """Map the memory of a descriptor from another process, and close the descriptor."""
    try:
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def _reserve(num_bytes: int) -> tuple[int, str]:
    """Reserve memory of the first kind that is available; return (descriptor, kind)."""
    refused = []
    for kind, make in _KINDS.items():
        descriptor = -1
        try:
            descriptor = make()
            os.ftruncate(descriptor, num_bytes)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(descriptor, 0, num_bytes)
            return descriptor, kind
        except (OSError, AttributeError) as error:
            refused.append(f"{kind}: {getattr(error, 'strerror', None) or 'this system does not have it'}")
            if descriptor >= 0:
                os.close(descriptor)
    raise SettingsError(
        f"{num_bytes:,} bytes of shared memory for the decoding processes are not available ({'; '.join(refused)})",
        "the processes would have no memory for their images",
        f"free that much memory or disk space, set TMPDIR to a folder that has it ({tempfile.gettempdir()} was tried), "
        "set data.prefetch or train.batch_size lower, or decode in threads: data.workers='4 threads', for a command "
        "--workers '4 threads'",
    )


def _open_memfd() -> int:
    return os.memfd_create("wasteddp")


def _open_unlinked(folder: str | None) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


_KINDS: dict[str, Callable[[], int]] = {
    "memfd": _open_memfd,
    "/dev/shm": lambda: _open_unlinked("/dev/shm"),
    "a temporary file": lambda: _open_unlinked(None),
}
