"""What a start writes into the folder of a run, and the mark of a run that can be resumed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
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
from wasteddp.training.watchdog import slurm
from wasteddp.training.watchdog.exits import STOP

_RESUMABLE_MARK = "RESUMABLE"


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
        print(messages.stopped_before_it_began(STOP.signal_name), flush=True)
        try:
            if not is_check:
                make_folder(out)
                mark_resumable(out)
        except OSError as error:
            print(f"WARNING: {out / _RESUMABLE_MARK} cannot be written: {error}", flush=True)
    return EXIT_RESUMABLE


@contextlib.contextmanager
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
