"""What a process that ends before its time leaves behind: its threads' stacks, a line in the log, its exit code."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from wasteddp.errors import EXIT_FINISHED, EXIT_RESUMABLE


def write_stacks(run: Path, rank: int) -> None:
    """What each thread is doing, into `run/failures/`; a disk that cannot take it is no reason to stay."""
    with suppress(OSError):
        (run / "failures").mkdir(parents=True, exist_ok=True)
        with (run / "failures" / f"rank-{rank:05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)


def append_to_log(run: Path, message: str) -> None:
    """A message behind the run's log, past the tracker that may be stuck; nothing where there is no log yet."""
    path = run / "log.txt"
    if path.exists():
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{time.strftime('%F %T')} {line}\n" for line in message.splitlines()))


def leave(code: int) -> NoReturn:
    """Ends the process with `code`; after a failure at once: an ordinary exit waits for collectives and threads."""
    if code in (EXIT_FINISHED, EXIT_RESUMABLE):
        raise SystemExit(code)
    leave_now(code)


def leave_now(code: int) -> NoReturn:
    """From any thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
