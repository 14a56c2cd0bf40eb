"""Addresses and processes of a training on one machine, for `launcher`, `verify-resume` and tests. No torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_TRAIN = Path(__file__).parents[2] / "train.py"
_POLL_S = 0.02
_END_S = 120.0  # for the other ranks to end after one has ended


def rank_environment(rank: int, num: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for one of `num` processes on one machine; empty for a single one."""
    if num == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Ranks:
    """The processes of one training."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
        self.processes, self.log = processes, log

    @classmethod
    def started(cls, arguments: Sequence[str], num: int, run: Path) -> Ranks:
        """Start `num` processes; their output goes to `run`.log."""
        log, port = run.with_name(f"{run.name}.log"), free_port()
        processes = []
        with log.open("a", encoding="utf-8") as file:
            for rank in range(num):
                environment = os.environ | rank_environment(rank, num, port)
                command = [sys.executable, str(_TRAIN), *arguments]
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        return cls(processes, log)

    @property
    def are_running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)

    def wait(self) -> tuple[int, ...]:
        """Return all exit codes. After one process ends, the others have 120 s to end before they are killed."""
        until: float | None = None
        while any(process.poll() is None for process in self.processes):
            if until is None and not self.are_running:
                until = time.monotonic() + _END_S
            if until is not None and time.monotonic() > until:
                self.send(signal.SIGKILL)
            time.sleep(_POLL_S)
        return tuple(process.wait() for process in self.processes)
