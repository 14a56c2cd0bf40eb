"""What a run tells: metrics.jsonl (the truth), W&B (a mirror of it), log.txt and the terminal.

Rank 0 writes, the others are quiet.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wasteddp.errors import storage
from wasteddp.training.wandb_mirror import WandbMirror

# Every metric that a run writes: (unit, meaning). Nothing else may be logged.
METRICS: dict[str, tuple[str, str]] = {
    "epoch": ("epochs", "epochs done, with the fraction of the present one"),
    "lr": ("1", "learning rate of the step"),
    "train/loss": ("nats", "mean over the global batches since the last row"),
    "train/grad_norm": ("1", "norm of the gradient before clipping, at the step"),
    "train/images_per_s": ("images/s", "of all ranks, since the last row"),
    "train/step_ms": ("ms", "mean time of a step since the last row"),
    "train/wait_fraction": ("1", "part of the time that rank 0 waited for data"),
    "train/damaged": ("samples", "training samples replaced since the run began"),
    "coverage/samples": ("samples", "trained on in the epoch that ended, by all ranks"),
    "coverage/expected": ("samples", "of that epoch, by the manifest and the plan"),
    "coverage/replaced": ("samples", "of these: damaged, another stood in"),
    "coverage/ok": ("1", "1: each sample exactly once, by count and hash; 0: the run stops"),
    "val/loss": ("nats", "mean cross-entropy over the split, without smoothing or weights"),
    "val/accuracy": ("1", "part of the split that is right"),
    "val/macro_recall": ("1", "mean of the classes' recalls"),
    "val/macro_f1": ("1", "mean of the classes' F1"),
    "val/samples": ("samples", "counted, equal to the manifest's"),
    "val/seconds": ("s", "time of the evaluation"),
    "best/value": ("1", "best value of evaluate.metric so far"),
    "checkpoint/stall_ms": ("ms", "time that the loop waited to hand over the last checkpoint"),
    "attempt": ("starts", "starts of this run, this one included"),
}


class Tracker(Protocol):
    """What the loop may say. `step` is the number of optimizer steps done."""

    id: str

    def say(self, message: str) -> None: ...
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def advance(self, step: int, text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self, exit_code: int) -> None: ...


class NoTracker:
    """For every rank but the first."""

    id = ""

    def say(self, message: str) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def advance(self, step: int, text: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self, exit_code: int) -> None:
        pass


class ConsoleTracker(NoTracker):
    """Says things and keeps nothing: for a check."""

    def say(self, message: str) -> None:
        print(message, flush=True)


class RunTracker:
    """Writes a run's folder and mirrors it.

    Args:
        folder: of the run.
        total_steps: of the run, for the progress bar.
        resumed_step: rows behind it are rolled back: they will be written again.
        tracker_id: W&B's id of the run; '' for a new one.
        wandb: settings.track.wandb.
        project: W&B's project.
        config: W&B's copy of the settings.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        resumed_step: int,
        tracker_id: str,
        wandb: str,
        project: str,
        config: Mapping[str, Any],
    ) -> None:
        with storage("writing the run's folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._log_file: TextIO = (folder / "log.txt").open("a", buffering=1, encoding="utf-8")
            kept = rolled_back(folder / "metrics.jsonl", resumed_step)
            self._metrics_file: TextIO = (folder / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._started = time.time()
        self._bar = _progress_bar(total_steps, resumed_step)
        self._wandb = WandbMirror(
            folder, mode=wandb, project=project, run_id=tracker_id, config=config, history=kept, say=self.say
        )
        self.id = self._wandb.run_id

    def say(self, message: str) -> None:
        """A line on the terminal and in log.txt."""
        self._log_file.write("".join(f"{time.strftime('%F %T')} {line}\n" for line in message.splitlines()))
        if self._bar:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, flush=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        unknown = metrics.keys() - METRICS.keys()
        if unknown:
            raise KeyError(f"not in the table of metrics: {sorted(unknown)}")
        row = {"step": step, "time_s": round(time.time(), 3), **metrics}
        with storage("writing metrics.jsonl", self._metrics_file.name):
            self._metrics_file.write(json.dumps(row) + "\n")
        self._wandb.log(step, metrics)

    def advance(self, step: int, text: str) -> None:
        """Moves the progress bar, where there is a terminal."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)

    def flush(self) -> None:
        """Before a checkpoint: the rows up to it are on the disk."""
        self._metrics_file.flush()
        os.fsync(self._metrics_file.fileno())

    def close(self, exit_code: int) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
        self._wandb.finish(exit_code)
        self._metrics_file.close()
        self._log_file.close()


def rolled_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops rows after `step`, and a last line that a kill cut; returns those that stay."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut by a kill: it is behind the last checkpoint, which flushed what was before
        if row["step"] <= step:
            rows.append(row)
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
    return rows


class TrackerScope:
    """`with TrackerScope(tracker):` closes it with the exit code of what happened inside."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def __enter__(self) -> Tracker:
        return self._tracker

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tracker.close(exit_code=0 if error is None else 1)


def _progress_bar(total_steps: int, done: int) -> Progress | None:
    if not sys.stdout.isatty():
        return None
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True
    )
    bar.add_task("starting", total=total_steps, completed=done)
    bar.start()
    return bar
