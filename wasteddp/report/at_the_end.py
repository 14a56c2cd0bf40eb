"""The report at the end of a training, whatever that end is: in a process of its own, in bounded time.

That it cannot be written is said, and is no failure of the training.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wasteddp.errors import WastedError
from wasteddp.training import signals

_LIMIT_S = 60.0
_LIMIT_WHEN_STOPPED_S = 15.0  # a scheduler kills half a minute after its signal; everything else is saved by then


@contextmanager
def reported(run: Path, say: Callable[[str], None], *, is_main: bool) -> Iterator[None]:
    """Rank 0 writes `RUN/report.html` behind the block, also behind an error; the other ranks do not wait for it."""
    try:
        yield
    except WastedError:
        if is_main:
            say(write_within(_LIMIT_S, run))
        raise
    if is_main:
        say(write_within(_LIMIT_WHEN_STOPPED_S if signals.STOP else _LIMIT_S, run))


def write_within(limit_s: float, run: Path) -> str:
    """Runs `wasteddp report RUN` and says what came of it.

    A process can be killed when its time is up, and what it takes of memory ends with it.
    """
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(part for part in (str(root), os.environ.get("PYTHONPATH", "")) if part)
    try:
        done = subprocess.run(
            # -P: not from the working directory, which may hold anything
            [sys.executable, "-P", "-m", "wasteddp.cli", "report", str(run)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            start_new_session=True,  # a second Ctrl-C is for the training
        )
    except subprocess.TimeoutExpired:
        return f"report: not written within {limit_s:g} s; everything else is; write it with: wasteddp report {run}"
    except OSError as error:
        return f"report: not written, {error}; write it with: wasteddp report {run}"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"report: not written, {reason}; try: wasteddp report {run}"
    return f"report: {run}/report.html"
