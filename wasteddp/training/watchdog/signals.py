"""Handlers of SIGTERM, SIGINT and SIGUSR1: the run saves and stops at the next step.

The module does not import torch, because the handlers are installed before torch is imported.

Preemption, `kill` and a Slurm time limit send SIGTERM. A batch script passes SIGUSR1 on as a warning.

Launchers handle their own signals as follows (accelerate 1.15, torch 2.14). With several processes they pass SIGTERM
and SIGINT on, and kill after 30 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 makes that 600 s). SIGUSR1, and SIGTERM to
`accelerate launch` with one process, end only the launcher, and the training would continue without it. Therefore the
kernel is set to send SIGTERM to the process when its launcher ends for any reason, so that the run saves then too.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

EXIT_AT_ONCE = 128 + signal.SIGINT  # the convention of shells for an interrupted program

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# Each launcher sets one of them. Without a launcher the parent may be a shell, whose end must not matter (nohup).
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "WASTEDDP_LAUNCHER")


@dataclass(slots=True)
class StopRequest:
    """The name of the signal that requested the stop, or ''."""

    signal_name: str = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


STOP = StopRequest()


def install(environment: Mapping[str, str] = os.environ) -> None:
    """Install the handlers: the first signal sets `STOP`, and a later SIGINT ends the process."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _request)
    arrived, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    threading.Thread(target=_leave_at_the_second, args=(arrived,), name="signals", daemon=True).start()
    if sys.platform == "linux" and any(name in environment for name in _LAUNCHERS):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _request(number: int, frame: FrameType | None) -> None:
    STOP.signal_name = STOP.signal_name or signal.Signals(number).name


def _leave_at_the_second(arrived: int) -> None:
    """End the process at the second signal, in a separate thread: Python's handlers run in the main thread, which may
    be waiting for another rank or a disk.

    An exit without cleanup does not damage files on disk: `kill -9` does the same.
    """
    asked = False
    while number := os.read(arrived, 1):
        if asked and number[0] == signal.SIGINT:
            if select.select([], [sys.stderr], [], 0)[1]:  # a full pipe or a stopped terminal must not hold the exit
                os.write(sys.stderr.fileno(), b"ended immediately; run the same command again to resume\n")
            os._exit(EXIT_AT_ONCE)
        asked = True
