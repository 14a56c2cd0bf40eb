"""What decodes images for a network: threads of this process, or processes of their own, and how many."""

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
    """So many threads; processes, where there is a server that forks them."""

    number: int
    server: DecodeServer | None = None


@contextmanager
def start_workers(asked: int | str, device_type: str, *, cores: int = 0) -> Iterator[Workers]:
    """For a command that has the machine to itself, or `cores` of it.

    A server imports its modules while this process starts CUDA.

    Args:
        asked: as the setting data.workers.
        device_type: of the device that the network will run on, such as cuda.
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
    """What decodes for one process that computes and has so many cores.

    One core is left to the thread that launches kernels, from five cores on another to the backward pass's.
    """
    if not processes:
        return min(cores, _MAX_THREADS)
    return max(1, min(cores - (1 if cores < 5 else 2), _MAX_PROCESSES))
