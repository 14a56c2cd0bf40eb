"""SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop at the next step. No torch here: installed before it loads.

SIGTERM is what preemption, `kill` and a Slurm time limit send; SIGUSR1 what a batch script passes on as a warning.

What launchers do with a signal that they get themselves (accelerate 1.15, torch 2.14): with several processes both pass
SIGTERM and SIGINT on and kill after 30 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 makes it 600); SIGUSR1, and SIGTERM to
`accelerate launch` with one process, end the launcher alone, and the training would go on without it. So the kernel is
asked to send SIGTERM when the launcher dies, of whatever: the run then saves as well.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

EXIT_AT_ONCE = 128 + signal.SIGINT  # what a shell expects of an interrupted program

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# Each launcher sets one; without a launcher the parent may be a shell, whose end is none of our business (nohup).
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "WASTEDDP_LAUNCHER")


@dataclass(slots=True)
class StopRequest:
    """The name of the signal that asked for it, or ''."""

    signal_name: str = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


STOP = StopRequest()


def install(environment: Mapping[str, str] = os.environ) -> None:
    """From here on the first signal sets `STOP`; a second SIGINT leaves at once."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _request)
    arrived, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_leave_at_the_second, args=(arrived,), name="signals", daemon=True).start()
    if sys.platform == "linux" and any(name in environment for name in _LAUNCHERS):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _request(number: int, frame: FrameType | None) -> None:
    STOP.signal_name = STOP.signal_name or signal.Signals(number).name


def _leave_at_the_second(arrived: int) -> None:
    """A thread of its own: Python's handlers wait for the main thread, which may wait for another rank, or a disk.

    Leaving without cleaning up harms nothing that is on the disk: it is what `kill -9` does too.
    """
    asked = False
    while number := os.read(arrived, 1):
        if asked and number[0] == signal.SIGINT:
            os.write(sys.stderr.fileno(), b"left at once; the same command goes on from the newest checkpoint\n")
            os._exit(EXIT_AT_ONCE)
        asked = True
