"""What a host does not wait for: for the tests of what runs on a GPU, with one and without."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
_READS = torch.ops.aten._local_scalar_dense.default


@contextmanager
def no_wait_for_the_gpu() -> Iterator[None]:
    """An operation of the block for which the host waits for the GPU is an error; later operations are not looked at.

    To switch it on warns, and warnings are errors: without the filter it would stay on for all tests that follow.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors in the block, on any device: on a GPU it waits for each."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is _READS
        return func(*args, **(kwargs or {}))
