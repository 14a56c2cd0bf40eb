"""What a process that ends before its time leaves behind: its threads' stacks, a line in the log, its exit code; and
what else was to be done at the end of a block that it will not come to."""

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

_WORDS_S = 25.0  # a launcher kills 30 s after the first of its processes has ended
_acts: list[Callable[[], object]] = []


def write_stacks(run: Path, rank: int) -> None:
    """What each thread is doing, into `run/failures/`; a disk that cannot take it is no reason to stay."""
    with suppress(OSError):
        (run / "failures").mkdir(parents=True, exist_ok=True)
        with (run / "failures" / f"rank-{rank:05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)


def append_to_log(run: Path, message: str) -> None:
    """A message appended to the run's log, past the tracker that may be stuck; nothing where there is no log yet."""
    path = run / "log.txt"
    if path.exists():
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{time.strftime('%F %T')} {line}\n" for line in message.splitlines()))


@contextmanager
def at_a_hard_exit(act: Callable[[], object]) -> Iterator[None]:
    """If the process leaves by `leave_with_words` inside the block, `act` is called first, in a thread: it must neither
    trust the loop's objects, at which the loop may hang, nor take long."""
    _acts.append(act)
    try:
        yield
    finally:
        _acts.remove(act)


def leave_with_words(code: int, run: Path, rank: int) -> NoReturn:
    """Ends the process whatever its loop hangs at, from the thread that watches it: stacks first, then what was asked
    for by `at_a_hard_exit`. A disk that does not answer holds it for a while, not for ever."""

    def speak() -> None:
        write_stacks(run, rank)
        for act in _acts:
            act()

    within(_WORDS_S, speak)
    leave_now(code)


def within(limit_s: float, act: Callable[[], object]) -> None:
    """Does it in a thread of its own, which is left behind when its time is up: a disk may never answer."""
    thread = threading.Thread(target=act, name="last words", daemon=True)
    thread.start()
    thread.join(limit_s)


def leave(code: int) -> NoReturn:
    """Ends the process with `code`: after its exit handlers, or after a failure at once.

    The interpreter is not torn down. After a failure that would wait for collectives and threads; and threads of torch
    and gloo outlive their process group now and then: their destructors then abort a rank that had finished (seen:
    "terminate called without an active exception", exit code -6), and its launcher says that the run failed.
    """
    if code in (EXIT_FINISHED, EXIT_RESUMABLE):
        atexit._run_exitfuncs()
    leave_now(code)


def leave_now(code: int) -> NoReturn:
    """From any thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
