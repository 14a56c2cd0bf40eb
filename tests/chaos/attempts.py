"""Attempts of a training as processes that can be killed: forked from this process, which has imported torch.

A start takes a tenth of the time of a new process. Before the fork there is no thread and no process group; each child
creates its own. The harness acts as the launcher: if a rank fails, it ends the other ranks, as torchrun does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from wasteddp import train
from wasteddp.errors import EXIT_FINISHED, EXIT_RESUMABLE
from wasteddp.training.distributed.launcher import free_port, rank_environment
from wasteddp.training.watchdog import exits

from . import inside
from .events import Event

LIMIT_S = 90.0  # for an attempt; longer counts as a hang, which is a failure
_GRACE_S = 15.0  # until the remaining ranks are killed
_POLL_S = 0.002


class HangError(Exception):
    """An attempt that did not end."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Exit codes by rank (the negative signal of a killed rank), and the duration."""

    codes: tuple[int, ...]
    seconds: float
    had_to_kill: int  # remaining ranks that did not end by themselves

    @property
    def finished(self) -> bool:
        return set(self.codes) == {EXIT_FINISHED}

    @property
    def stopped(self) -> bool:
        return set(self.codes) == {EXIT_RESUMABLE}


def attempt(arguments: list[str], run: Path, event: Event | None, processes: int) -> Outcome:
    """Start the ranks, apply the event, and wait for their end.

    Raises:
        HangError: a rank did not end within LIMIT_S.
    """
    began, port = time.monotonic(), free_port()
    pids: list[int] = []
    # signals are blocked until a rank has its handlers
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _be_rank(arguments, run, event, rank, processes, port, pids[0] if pids else 0)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    codes: dict[int, int] = {}
    sent = event is None or event.kind not in ("signal", "flip")
    closing = 0.0
    had_to_kill = 0
    while len(codes) < processes:
        _reap(pids, codes)
        now = time.monotonic() - began
        if not sent and event and now >= event.delay_s:
            sent = True
            targets = {"all": pids, "one": pids[-1:], "first": pids[:1]}[event.target]
            _send(targets, codes, signal.Signals[event.signal])
        if not closing and any(code not in (EXIT_FINISHED, EXIT_RESUMABLE) for code in codes.values()):
            closing = now
            _send(pids, codes, signal.SIGTERM)
        if closing and now > closing + _GRACE_S:
            had_to_kill = processes - len(codes)
            _send(pids, codes, signal.SIGKILL)
        if now > LIMIT_S:
            _send(pids, codes, signal.SIGKILL)
            raise HangError(f"{event} still ran after {LIMIT_S:g} s")
        time.sleep(_POLL_S)
    return Outcome(tuple(codes[pid] for pid in pids), time.monotonic() - began, had_to_kill)


def _reap(pids: list[int], codes: dict[int, int]) -> None:
    for pid in pids:
        if pid not in codes:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)


def _send(pids: list[int], codes: dict[int, int], number: int) -> None:
    for pid in pids:
        if pid not in codes:
            os.kill(pid, number)


def _be_rank(
    arguments: list[str], run: Path, event: Event | None, rank: int, processes: int, port: int, group: int
) -> None:
    """Run a rank in the child process. Never returns."""
    code = 1
    try:
        os.setpgid(0, group)
        log = os.open(run.with_name(f"{run.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(rank_environment(rank, processes, port))
        exits.install_handlers({})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
        inside.prepare(event, run, rank)
        code = train.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
