"""SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop at the next step. No torch here: installed before it loads.

SIGTERM is what preemption, `kill` and a Slurm time limit send; SIGUSR1 what a batch script passes on as a warning.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class StopRequest:
    """The name of the signal that asked for it, or ''."""

    signal_name: str = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


STOP = StopRequest()


def install() -> None:
    """From here on the first signal sets `STOP`; a second SIGINT leaves at once."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _request)


def _request(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and STOP:
        raise KeyboardInterrupt
    STOP.signal_name = signal.Signals(number).name
