"""What a host does not wait for: for the tests that need a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
