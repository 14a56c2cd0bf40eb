"""Checks that the host does not wait for the GPU, for tests with and without a GPU."""

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
    """Raise if an operation of the block makes the host wait for the GPU.

    Enabling the check warns, and warnings are errors: without the filter it would stay enabled for all later tests.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors, on any device: on a GPU it waits for each."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is _READS
        return func(*args, **(kwargs or {}))
