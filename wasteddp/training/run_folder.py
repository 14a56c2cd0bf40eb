"""The folder of a run at its two ends: what a start writes into it, and the mark of one that can go on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from wasteddp import environment
from wasteddp.errors import EXIT_RESUMABLE
from wasteddp.files import write_atomically
from wasteddp.settings import Settings
from wasteddp.training import messages
from wasteddp.training.checkpoint.reader import Checkpoint, Progress
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.tracking.tracker import ConsoleTracker, NoTracker, Tracker, run_tracker
from wasteddp.training.watchdog import slurm
from wasteddp.training.watchdog.signals import STOP

_RESUMABLE_MARK = "RESUMABLE"


def begin_run(
    settings: Settings,
    world: Runtime,
    data: Inputs,
    progress: Progress,
    checkpoint: Checkpoint | None,
    *,
    last_step: int,
    is_recorded: bool = True,
) -> Tracker:
    """All ranks: rank 0 writes the run's records and tracks it; the others do neither.

    Args:
        is_recorded: False where this start trains and measures nothing: the records stay as they are.
    """
    tracker: Tracker = NoTracker()
    with world.together():
        if world.is_main and not is_recorded:
            tracker = ConsoleTracker()
            tracker.id = progress.tracker_id
        elif world.is_main:
            out = Path(settings.run.out)
            (out / _RESUMABLE_MARK).unlink(missing_ok=True)
            (out / slurm.MISTAKE_MARK).unlink(missing_ok=True)
            write_atomically(out / "settings.yaml", settings.to_yaml().encode())
            write_atomically(out / "environment.json", json.dumps(environment.describe(), indent=1).encode())
            own = checkpoint is not None and out.resolve() in checkpoint.path.resolve().parents
            tracker = run_tracker(
                settings, data.manifest, progress, last_step=last_step, own=own, world_size=world.world_size
            )
    return tracker


def mark_resumable(out: Path) -> None:
    """For those who see no exit code of ours: launchers replace it by 1."""
    write_atomically(out / _RESUMABLE_MARK, b"")


def stopped_before_it_began(settings: Settings, *, is_check: bool) -> int:
    """What a signal leaves while the shard set is still waited for: no step is lost. Returns the exit code."""
    if environment.launched("RANK", 0) == 0:
        print(messages.stopped_before_it_began(STOP.signal_name), flush=True)
        out = Path(settings.run.out)
        try:
            if not is_check:
                out.mkdir(parents=True, exist_ok=True)
                mark_resumable(out)
        except OSError as error:
            print(f"WARNING: {out} cannot be marked as one to go on with: {error}", flush=True)
    return EXIT_RESUMABLE


@contextlib.contextmanager
def rehearse(settings: Settings) -> Iterator[Settings]:
    """The same run in a folder beside run.out that is removed: same disk, same permissions, nothing left."""
    out = f"{settings.run.out}.check"
    if environment.launched("RANK", 0) == 0:  # before it joins the others: a check that was killed may have left one
        shutil.rmtree(out, ignore_errors=True)
    track = settings.track.model_copy(update={"wandb": "disabled"})
    try:
        yield settings.model_copy(update={"run": settings.run.model_copy(update={"out": out}), "track": track})
    finally:
        if environment.launched("RANK", 0) == 0:
            shutil.rmtree(out, ignore_errors=True)
