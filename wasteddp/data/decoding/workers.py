"""The kind and number of workers that decode images for a network: threads or processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from wasteddp.data.decoding.pool import DecodeServer
from wasteddp.parallel import num_usable_cores
from wasteddp.settings import Data

_MAX_THREADS, _MAX_PROCESSES = 8, 24


@dataclass(frozen=True, slots=True)
class Workers:
    """A number of threads, or of processes if there is a server that forks them."""

    number: int
    server: DecodeServer | None = None


@contextmanager
def start_workers(asked: int | str, device_type: str, *, cores: int = 0) -> Iterator[Workers]:
    """Choose workers for a command that may use all cores, or `cores` of them; start their server if they need one.

    The server imports its modules while this process starts CUDA.

    Args:
        asked: as the setting data.workers.
        device_type: of the device that the network will run on, such as cuda.
        cores: 0: all cores that this process may use.
    """
    data = Data(workers=asked)
    processes = data.uses_processes(device_type)
    number = data.num_workers or default_workers(cores or num_usable_cores(), processes=processes)
    if not processes:
        yield Workers(number)
        return
    with DecodeServer() as server:
        yield Workers(number, server)


def default_workers(cores: int, *, processes: bool) -> int:
    """Return the number of workers for one training process with this many cores.

    One core is reserved for the thread that launches kernels, and from five cores on another for the backward pass.
    """
    if not processes:
        return min(cores, _MAX_THREADS)
    return max(1, min(cores - (1 if cores < 5 else 2), _MAX_PROCESSES))
