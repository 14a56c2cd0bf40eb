"""Exchanges heartbeats, positions and failures between the ranks through the launcher's TCPStore.

It uses a separate connection, because the loop may block torch's connection for minutes.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented, not in __all__

_FAILURE = "failure"
_ANSWER = timedelta(seconds=30)
_CONNECT_S = 5.0


class LostStoreError(Exception):
    """The store does not respond: its process, the launcher or rank 0, has ended."""


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat. `marks` counts the places that the loop has passed: the same sequence on every rank."""

    count: int
    marks: int
    step: int
    place: str
    quiet_s: float  # since the last mark
    detail: str = ""
    left: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure that ends the run, reported by one rank for all."""

    reported_by: int
    message: str
    exit_code: int


class HeartbeatStore:
    def __init__(self, store: Store, world_size: int) -> None:
        self._store, self._world_size = PrefixStore("wasteddp-watch", store), world_size

    @classmethod
    def of_launcher(cls, host: str, port: int, world_size: int, *, patience_s: float) -> HeartbeatStore:
        """Connect to the store of the launcher, or else of rank 0, at MASTER_ADDR and MASTER_PORT."""
        with _or_lost():
            store = TCPStore(host, port, None, False, timedelta(seconds=patience_s), wait_for_workers=False)
            store.set_timeout(_ANSWER)
        return cls(store, world_size)

    def post(self, rank: int, beat: Beat) -> None:
        with _or_lost():
            self._store.set(f"beat/{rank}", json.dumps(asdict(beat)))

    def beat(self, rank: int) -> Beat | None:
        """Return the last beat of a rank; None before its first."""
        with _or_lost():
            key = f"beat/{rank}"
            return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def beats(self) -> list[Beat | None]:
        """Return the last beats of all ranks, for the message of a failure."""
        return [self.beat(rank) for rank in range(self._world_size)]

    def failure(self) -> Failure | None:
        with _or_lost():
            return Failure(**json.loads(self._store.get(_FAILURE))) if self._store.check([_FAILURE]) else None

    def claim(self, failure: Failure) -> Failure:
        """Report a failure, unless another one was reported before, and return the first one."""
        with _or_lost():
            return Failure(**json.loads(self._store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))))


def answers(host: str, port: int) -> bool:
    """Whether a server listens there. It opens a plain connection: each failed try of a TCPStore prints a stack and
    cannot be interrupted."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


@contextmanager
def _or_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's DistNetworkError, DistStoreError and a refused connection are RuntimeErrors
        raise LostStoreError(str(error)) from error
