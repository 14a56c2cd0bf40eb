"""Ends a process that cannot leave its loop: writes the stacks of its threads and the log, runs the actions that its
blocks have registered, and sets the exit code."""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from wasteddp.errors import EXIT_FINISHED, EXIT_RESUMABLE

_LIMIT_S = 25.0  # a launcher kills the others 30 s after the first of its processes has ended
_FLUSH_S = 2.0  # limit for printing what is buffered
_acts: list[Callable[[], object]] = []


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
    """End the process without exit handlers, from any thread, also where nobody reads its output."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()

    within(_FLUSH_S, flush)
    os._exit(code)
