"""What a start writes into the folder of a run, the mark of a run that can be resumed, and the report at its end.

The report is written after success or failure, in a separate process and in bounded time. If it cannot be written, the
reason is printed and the training does not fail. There is no report if rank 0 is killed or exits immediately at a
second SIGINT: the next end of the run or `wasteddp report` writes it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from wasteddp import environment
from wasteddp.errors import EXIT_FINISHED, EXIT_RESUMABLE, TrackingError, storage
from wasteddp.files import make_folder, write_atomically
from wasteddp.inference.bundle import FOLDER_NAME
from wasteddp.settings import Settings
from wasteddp.training import messages
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.checkpoint.reader import Checkpoint
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.tracking import wandb_client
from wasteddp.training.tracking.tracker import ConsoleTracker, NoTracker, Tracker, run_tracker
from wasteddp.training.watchdog import exits, slurm

_RESUMABLE_MARK = "RESUMABLE"
_REPORT_S = 60.0
# A scheduler kills half a minute after its signal, and a launcher half a minute after one of its processes has ended.
# Everything else is saved by then. A report that was started still finishes: it has a session of its own.
_REPORT_IN_HASTE_S = 15.0


def begin_run(
    settings: Settings,
    runtime: Runtime,
    data: Inputs,
    progress: Progress,
    checkpoint: Checkpoint | None,
    *,
    last_step: int,
    is_recorded: bool = True,
) -> Tracker:
    """Write settings.yaml and environment.json on rank 0, and return the tracker; it is empty on other ranks. All
    ranks.

    Args:
        is_recorded: False if the run was finished and closed before this start: its files stay as they are.
    """
    tracker: Tracker = NoTracker()
    with runtime.sharing_errors():
        if runtime.is_main and not is_recorded:
            tracker = ConsoleTracker()
            tracker.id = progress.tracker_id
        elif runtime.is_main:
            out = Path(settings.run.out)
            (out / _RESUMABLE_MARK).unlink(missing_ok=True)
            (out / slurm.MISTAKE_MARK).unlink(missing_ok=True)
            _remove_unfinished(out)
            write_atomically(out / "settings.yaml", settings.to_yaml().encode())
            write_atomically(out / "environment.json", json.dumps(environment.describe(), indent=1).encode())
            own = checkpoint is not None and out.resolve() in checkpoint.path.resolve().parents
            tracker = run_tracker(
                settings, data.manifest, progress, last_step=last_step, own=own, world_size=runtime.world_size
            )
    return tracker


def _remove_unfinished(out: Path) -> None:
    """Remove what an earlier start, or an evaluation, left half written. Requires the lock on the checkpoints."""
    with storage("removing unfinished files", out):
        for pattern in ("*.tmp", f"{FOLDER_NAME}/*.tmp", "evaluations/*/*.tmp"):
            for path in out.glob(pattern):
                path.unlink(missing_ok=True)
        for path in out.glob("media/.*.tmp"):
            shutil.rmtree(path)


def is_closed(out: Path) -> bool:
    """Whether the run in this folder has finished and written its records: the exit code is written last."""
    try:
        return wandb_client.load_identity(out).exit_code == EXIT_FINISHED
    except TrackingError:
        return False


def mark_resumable(out: Path) -> None:
    """Write the file RESUMABLE, since a launcher replaces the exit code of a rank by 1."""
    write_atomically(out / _RESUMABLE_MARK, b"")


def stopped_before_it_began(out: Path, *, is_check: bool) -> int:
    """Report a stop by a signal before the first step, mark the run as resumable, and return the exit code."""
    if environment.launched("RANK", 0) == 0:
        print(messages.stopped_before_it_began(exits.STOP.signal_name), flush=True)
        try:
            if not is_check:
                make_folder(out)
                mark_resumable(out)
        except OSError as error:
            print(f"WARNING: {out / _RESUMABLE_MARK} cannot be written: {error}", flush=True)
    return EXIT_RESUMABLE


@contextmanager
def rehearse(settings: Settings) -> Iterator[Settings]:
    """Redirect the run to a temporary folder next to run.out, with the same disk and permissions."""
    out = f"{settings.run.out}.check"
    if environment.launched("RANK", 0) == 0:  # before it joins the other ranks; left by a check that was killed
        shutil.rmtree(out, ignore_errors=True)
    track = settings.track.model_copy(update={"wandb": "disabled"})
    try:
        yield settings.model_copy(update={"run": settings.run.model_copy(update={"out": out}), "track": track})
    finally:
        if environment.launched("RANK", 0) == 0:
            shutil.rmtree(out, ignore_errors=True)


@contextmanager
def report_at_the_end(run: Path, say: Callable[[str], None], *, is_main: bool) -> Iterator[None]:
    """Write `RUN/report.html` on rank 0 after the block, also after an error or when a hang ends the process.

    The other ranks do not wait for it.
    """

    def instead() -> None:
        message = write_report_within(_REPORT_IN_HASTE_S, run)
        print(message, flush=True)
        exits.append_to_log(run, message)  # `say` may be the function that hangs

    try:
        with exits.at_a_hard_exit(instead) if is_main else nullcontext():
            yield
    except Exception:
        if is_main:
            say(write_report_within(_REPORT_IN_HASTE_S, run))
        raise
    if is_main:
        say(write_report_within(_REPORT_IN_HASTE_S if exits.STOP else _REPORT_S, run))


def write_report_within(limit_s: float, run: Path) -> str:
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
