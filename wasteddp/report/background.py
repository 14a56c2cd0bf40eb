"""Write the report at the end of a training, after success or failure, in a separate process and in bounded time.

If it cannot be written, the reason is printed and the training does not fail. There is no report if rank 0 is killed or
exits immediately at a second SIGINT: the next end of the run or `wasteddp report` writes it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from wasteddp.training.watchdog import exits

_LIMIT_S = 60.0
# A scheduler kills half a minute after its signal, and a launcher half a minute after one of its processes has ended.
# Everything else is saved by then. A report that was started still finishes: it has a session of its own.
_LIMIT_IN_HASTE_S = 15.0


@contextmanager
def write_at_the_end(run: Path, say: Callable[[str], None], *, is_main: bool) -> Iterator[None]:
    """Write `RUN/report.html` on rank 0 after the block, also after an error or when a hang ends the process.

    The other ranks do not wait for it.
    """

    def instead() -> None:
        message = write_within(_LIMIT_IN_HASTE_S, run)
        print(message, flush=True)
        exits.append_to_log(run, message)  # `say` may be the function that hangs

    try:
        with exits.at_a_hard_exit(instead) if is_main else nullcontext():
            yield
    except Exception:
        if is_main:
            say(write_within(_LIMIT_IN_HASTE_S, run))
        raise
    if is_main:
        say(write_within(_LIMIT_IN_HASTE_S if exits.STOP else _LIMIT_S, run))


def write_within(limit_s: float, run: Path) -> str:
    """Run `wasteddp report RUN`. Return a line with the result.

    A separate process can be killed after the time limit, and its memory is freed with it.
    """
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(part for part in (str(root), os.environ.get("PYTHONPATH", "")) if part)
    try:
        done = subprocess.run(
            # -P: do not import from the working directory, which may hold anything
            [sys.executable, "-P", "-m", "wasteddp.cli", "report", str(run)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            start_new_session=True,  # a second Ctrl-C must reach only the training
        )
    except subprocess.TimeoutExpired:
        return (
            f"report: not written within {limit_s:g} s; everything else is saved; write it with: wasteddp report {run}"
        )
    except OSError as error:
        return f"report: not written, {error}; write it with: wasteddp report {run}"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"report: not written, {reason}; try: wasteddp report {run}"
    return f"report: {run}/report.html"
