"""Events of an attempt of a training, drawn from a seed, so that each can be repeated."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
WRITES = ("write", "fsync", "rename")


@dataclass(frozen=True, slots=True)
class Event:
    """The event of one attempt.

    kind: signal   `signal` from outside to `target`, `delay_s` after all ranks have started
          save     rank 0 kills itself, or all, at the `nth` operation on the disk while it saves a checkpoint or model
          epoch    a rank sends `signal` to itself, or all do, at the start of the `nth` evaluation
          fault    `nth` write, fsync or rename of rank 0 fails with `error`, after half of the bytes if "short"
          read     reading the newest checkpoint fails with `error`, or returns bytes with one changed bit
          flip     a bit of the newest checkpoint is changed on the disk before the attempt, which then gets `signal`
    """

    number: int
    kind: str
    processes: int
    target: str = "all"  # all; one (the last rank); first (rank 0)
    signal: str = "SIGKILL"
    delay_s: float = 0.0
    nth: int = 0
    operation: str = ""
    error: int = 0  # an errno; 0 with `operation` flip
    short: bool = False

    @property
    def name(self) -> str:
        """The row of the event in the table."""
        if self.kind == "signal":
            ranks = {"all": "all ranks", "one": "the last rank", "first": "rank 0"}[self.target]
            return f"{self.signal} to {ranks if self.processes > 1 else 'the only rank'}"
        if self.kind == "save":
            return "SIGKILL in the middle of a save"
        if self.kind == "epoch":
            return f"{self.signal} in an evaluation"
        if self.kind == "fault":
            short = " after half of the bytes" if self.short else ""
            return f"{self.operation}: {errno.errorcode[self.error]}{short}"
        if self.kind == "read":
            return f"read: {errno.errorcode[self.error] if self.error else 'a bit changed'}"
        return "a bit of the newest checkpoint changed on the disk"


KINDS = {"signal": 45, "save": 22, "epoch": 10, "fault": 14, "read": 5, "flip": 4}  # per hundred


def draw(draws: random.Random, number: int, processes: int, only: str = "") -> Event:
    """Draw one event; about seven of ten are signals or kills. `only`: its kind."""
    kind = draws.choices(list(KINDS), weights=list(KINDS.values()))[0]
    kind = only or kind
    event = {"number": number, "kind": kind, "processes": processes, "target": draws.choice(["all", "one", "first"])}
    if kind in ("signal", "flip"):
        # at most about a third of an undisturbed training: some are before the first step, some in saves
        event |= {"signal": draws.choice(SIGNALS), "delay_s": round(draws.uniform(0.0, 1.2) ** 2, 4)}
    elif kind == "save":
        event |= {"nth": draws.randint(1, 60)}  # a save has 16 operations, with a new best model 22
    elif kind == "epoch":
        event |= {"nth": draws.randint(1, 2), "signal": draws.choice(SIGNALS)}
    elif kind == "fault":
        operation = draws.choice(WRITES)
        short = operation == "write" and draws.random() < 0.4
        event |= {"nth": draws.randint(1, 25), "operation": operation, "error": draws.choice(ERRORS), "short": short}
    else:
        error = draws.choice([errno.EIO, errno.EACCES, 0])
        event |= {"nth": 1, "operation": "read", "error": error}
    return Event(**event)  # type: ignore[arg-type]
