"""Where the ranks tell each other that they live, where they are, and who failed: the launcher's TCPStore.

A connection of its own, because the one that torch keeps may wait for minutes on behalf of the loop.
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


class LostBoardError(Exception):
    """The board does not answer: the process that keeps it, the launcher or rank 0, is gone."""


@dataclass(frozen=True, slots=True)
class Beat:
    """One sign of life. `marks` counts the places that the loop has passed: the same sequence on every rank."""

    count: int
    marks: int
    step: int
    place: str
    quiet_s: float  # since the last mark
    detail: str = ""
    left: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the run ends, as one rank tells it for all."""

    told_by: int
    message: str
    exit_code: int


class HeartbeatStore:
    def __init__(self, store: Store, world_size: int) -> None:
        self._store, self._world_size = PrefixStore("wasteddp-watch", store), world_size

    @classmethod
    def of_launcher(cls, host: str, port: int, world_size: int, *, patience_s: float) -> HeartbeatStore:
        """Connects to the store that the launcher, or else rank 0, keeps at MASTER_ADDR and MASTER_PORT."""
        with _or_lost():
            store = TCPStore(host, port, None, False, timedelta(seconds=patience_s), wait_for_workers=False)
            store.set_timeout(_ANSWER)
        return cls(store, world_size)

    def post(self, rank: int, beat: Beat) -> None:
        with _or_lost():
            self._store.set(f"beat/{rank}", json.dumps(asdict(beat)))

    def beat(self, rank: int) -> Beat | None:
        """The last one of a rank; None before its first."""
        with _or_lost():
            key = f"beat/{rank}"
            return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def beats(self) -> list[Beat | None]:
        """Of all ranks: for when something is wrong."""
        return [self.beat(rank) for rank in range(self._world_size)]

    def failure(self) -> Failure | None:
        with _or_lost():
            return Failure(**json.loads(self._store.get(_FAILURE))) if self._store.check([_FAILURE]) else None

    def claim(self, failure: Failure) -> Failure:
        """Tells a failure, unless another was told before; returns the one that stands."""
        with _or_lost():
            return Failure(**json.loads(self._store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))))


def answers(host: str, port: int) -> bool:
    """Whether somebody listens there. Asked with a plain connection: each try of a TCPStore that fails prints its own
    stack, and none can be broken off."""
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
        raise LostBoardError(str(error)) from error
