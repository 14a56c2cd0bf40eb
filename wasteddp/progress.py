"""How far a long job is: a bar on a terminal, a plain line every ten seconds anywhere else (log files, Slurm)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """3725 -> 1 h 2 min"""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress(doing: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call once for each item done."""
    if sys.stderr.isatty() and total:
        with _bar(doing, total) as advance:
            yield advance
        return
    done, last = 0, time.monotonic()

    def advance_plainly() -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            print(f"{doing}: {done:,} of {total:,} ({done / total:.0%})", file=sys.stderr, flush=True)

    yield advance_plainly


@contextmanager
def _bar(doing: str, total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda: bar.advance(task)
