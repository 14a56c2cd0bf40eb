"""How a training process ends: it saves and stops at the step after a signal, or leaves at once if it hangs.

The module does not import torch, because the handlers are installed before torch is imported.

Preemption, `kill` and a Slurm time limit send SIGTERM. A batch script passes SIGUSR1 on as a warning.

Launchers handle their own signals as follows (accelerate 1.15, torch 2.14). With several processes they pass SIGTERM
and SIGINT on, and kill after 30 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 makes that 600 s). SIGUSR1, and SIGTERM to
`accelerate launch` with one process, end only the launcher, and the training would continue without it. Therefore the
kernel is set to send SIGTERM to the process when its launcher ends for any reason, so that the run saves then too.

A process that cannot leave its loop writes the stacks of its threads and the log, runs the actions that its blocks have
registered, and sets the exit code.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from wasteddp.errors import EXIT_FINISHED, EXIT_RESUMABLE
from wasteddp.parallel import die_with_parent

EXIT_AT_ONCE = 128 + signal.SIGINT  # the convention of shells for an interrupted program
# Each launcher sets one of them. Without a launcher the parent may be a shell, whose end must not matter (nohup).
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "WASTEDDP_LAUNCHER")
_LIMIT_S = 25.0  # a launcher kills the others 30 s after the first of its processes has ended
_FLUSH_S = 2.0  # limit for printing what is buffered
_acts: list[Callable[[], object]] = []


@dataclass(slots=True)
class StopRequest:
    """The name of the signal that requested the stop, or ''."""

    signal_name: str = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


STOP = StopRequest()


def install_handlers(environment: Mapping[str, str] = os.environ) -> None:
    """Install the handlers: the first signal sets `STOP`, and a later SIGINT ends the process."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _request)
    arrived, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    threading.Thread(target=_leave_at_the_second, args=(arrived,), name="signals", daemon=True).start()
    if any(name in environment for name in _LAUNCHERS):
        die_with_parent(signal.SIGTERM)


def write_stacks(run: Path, rank: int) -> None:
    """Write the stack of each thread into `run/failures/`. An error of the disk is ignored."""
    with suppress(OSError):
        (run / "failures").mkdir(parents=True, exist_ok=True)
        with (run / "failures" / f"rank-{rank:05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)


def append_to_log(run: Path, message: str) -> None:
    """Append a message to the run's log, without the tracker, which may hang; do nothing if there is no log yet."""
    path = run / "log.txt"
    if path.exists():
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{time.strftime('%F %T')} {line}\n" for line in message.splitlines()))


@contextmanager
def at_a_hard_exit(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` if the process ends by `leave_with_stacks` inside the block. It runs in another thread: it must not
    use objects of the loop, which may hang in them, and must not take long."""
    _acts.append(act)
    try:
        yield
    finally:
        _acts.remove(act)


def leave_with_stacks(code: int, run: Path, rank: int) -> NoReturn:
    """End the process from the watchdog's thread while its loop hangs: write the stacks first, then run the actions of
    `at_a_hard_exit`. A disk that does not respond delays the exit for a limited time only."""

    def finish() -> None:
        write_stacks(run, rank)
        for act in _acts:
            act()

    within(_LIMIT_S, finish)
    leave_now(code)


def within(limit_s: float, act: Callable[[], object]) -> None:
    """Call `act` in a thread, and return after `limit_s` at the latest: a disk may never respond."""
    thread = threading.Thread(target=act, name="hard exit", daemon=True)
    thread.start()
    thread.join(limit_s)


def leave(code: int) -> NoReturn:
    """End the process with `code`: after its exit handlers, or immediately after a failure.

    The interpreter is not finalized. After a failure that would wait for collectives and threads. After a success,
    threads of torch and gloo sometimes outlive their process group: their destructors then abort a finished rank (seen:
    "terminate called without an active exception", exit code -6), and its launcher reports a failure.
    """
    if code in (EXIT_FINISHED, EXIT_RESUMABLE):
        atexit._run_exitfuncs()
    leave_now(code)


def leave_now(code: int) -> NoReturn:
    """End the process without exit handlers, from any thread, also if nobody reads its output."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()

    within(_FLUSH_S, flush)
    os._exit(code)


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
