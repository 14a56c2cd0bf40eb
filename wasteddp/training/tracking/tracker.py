"""Reports a run to metrics.jsonl, its mirrors W&B and TensorBoard, log.txt and the terminal.

Only rank 0 writes. metrics.jsonl is the complete record: the mirrors are written from it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from wasteddp.errors import StorageError, inert, print_line, storage
from wasteddp.files import make_folder
from wasteddp.redaction import redacted
from wasteddp.settings import Settings, Track
from wasteddp.training.tracking import pictures, wandb_client
from wasteddp.training.tracking.journal import Journal, is_known, roll_back
from wasteddp.training.tracking.mirrors import TensorBoardMirror, WandbMirror
from wasteddp.training.tracking.pictures import Gallery
from wasteddp.training.tracking.wandb_client import RunIdentity

if TYPE_CHECKING:
    from wasteddp.data.augmentation.augment import Augment
    from wasteddp.data.manifest import Manifest
    from wasteddp.inference.metrics import Seen
    from wasteddp.training.checkpoint import progress
    from wasteddp.training.dataloaders import Inputs

_REFRESHES_PER_S = 2  # a refresh takes 1 to 2 ms of one core
METRICS_FILE = "metrics.jsonl"  # in run.out: a row of metrics in each line


class Tracker(Protocol):
    """The interface for the loop. `step` is the number of optimizer steps done; `exit_code` is that of the run."""

    id: str
    exit_code: int

    def say(self, message: str, *, in_passing: bool = False) -> None: ...
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def show_augmented(self, data: Inputs, augment: Augment) -> None: ...
    def show_mistakes(self, step: int, data: Inputs, seen: Seen) -> None: ...
    def advance(self, step: int, text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self, exit_code: int) -> None: ...


class NoTracker:
    """Does nothing, for all ranks except rank 0."""

    id = ""
    exit_code = 0

    def say(self, message: str, *, in_passing: bool = False) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def show_augmented(self, data: Inputs, augment: Augment) -> None:
        pass

    def show_mistakes(self, step: int, data: Inputs, seen: Seen) -> None:
        pass

    def advance(self, step: int, text: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self, exit_code: int) -> None:
        pass


class ConsoleTracker(NoTracker):
    """Prints messages and writes nothing: for a start that neither trains nor measures."""

    def say(self, message: str, *, in_passing: bool = False) -> None:
        print_line(redacted(message))


class RunTracker:
    """Writes the log and metrics of a run, and its mirrors.

    Args:
        folder: the folder of the run.
        identity: the identity of the run on W&B.
        track: settings.track.
        total_steps: number of steps of the run, for the progress bar.
        resumed_step: rows after it are removed, because they will be written again.

    Raises:
        SettingsError: track.tensorboard is set and TensorBoard is not installed.
    """

    def __init__(
        self, folder: Path, identity: RunIdentity, *, track: Track, total_steps: int, resumed_step: int
    ) -> None:
        self._display: Display | None = None
        with storage("writing the run's folder", folder):
            make_folder(folder)
            self._log_file = Journal(folder / "log.txt", self._print)
            kept = roll_back(folder / METRICS_FILE, resumed_step, self.say)
            self._metrics_file = Journal(folder / METRICS_FILE, self._print)
            identity.save(folder)
        self.id, self.exit_code = identity.id, 0
        self._folder, self._identity, self._images = folder, identity, track.images
        if sys.stdout.isatty():
            self._display = Display(Console(), total_steps=total_steps, done=resumed_step)
        self._tensorboard: TensorBoardMirror | None = None
        if track.tensorboard:
            self._tensorboard = TensorBoardMirror(folder, resumed_step=resumed_step, history=kept, say=self.say)
        self._wandb = WandbMirror(folder, identity, track, history=kept, say=self.say)

    def say(self, message: str, *, in_passing: bool = False) -> None:
        """Print a message and append it to log.txt. `in_passing`: do not print it if there is a progress display."""
        message = inert(redacted(message))
        self._log_file.append("".join(f"{time.strftime('%F %T')} {line}\n" for line in message.splitlines()))
        if not (in_passing and self._display):
            self._print(message)

    def _print(self, message: str) -> None:
        if self._display:
            self._display.print(message)
        else:
            print_line(message)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        unknown = sorted(name for name in metrics if not is_known(name))
        if unknown:
            raise KeyError(f"not in the table of metrics: {unknown}")
        row = {"step": step, "time_s": round(time.time(), 3), **metrics}
        self._metrics_file.append(json.dumps(row) + "\n")
        if self._display:
            self._display.update(metrics)
        if self._tensorboard:
            self._tensorboard.log(row)
        self._wandb.log(row)

    def show_augmented(self, data: Inputs, augment: Augment) -> None:
        """The first training images as the network will see them."""
        self.show(0, lambda: pictures.augmented(data, augment, self._images))

    def show_mistakes(self, step: int, data: Inputs, seen: Seen) -> None:
        """The most confident mistakes of an evaluation."""
        self.show(step, lambda: pictures.mistakes(data, seen, self._images))

    def show(self, step: int, make: Callable[[], Gallery]) -> None:
        """Store images, which W&B receives with the next row; do nothing without W&B."""
        if self._images and self._wandb.is_on:
            try:
                pictures.save(self._folder, step, make())
            except Exception as error:  # training continues without the images
                self.say(f"the images of step {step} could not be stored: {type(error).__name__}: {error}")

    def advance(self, step: int, text: str) -> None:
        """Advance the progress bar, if there is a terminal."""
        if self._display:
            self._display.advance(step, text)

    def flush(self) -> None:
        """Flush the rows to the disk, before a checkpoint."""
        self._metrics_file.sync()
        if self._tensorboard:
            self._tensorboard.flush()

    def close(self, exit_code: int) -> None:
        if self._display:
            self._display.close()
            self._display = None
        if self._tensorboard:
            self._tensorboard.close()
        with suppress(StorageError):  # the last save has reported a full disk
            replace(self._identity, exit_code=exit_code).save(self._folder)
        self._wandb.finish(exit_code)
        self._metrics_file.close()
        self._log_file.close()


def run_tracker(
    settings: Settings,
    manifest: Manifest,
    progress: progress.Progress,
    *,
    last_step: int,
    own: bool,
    world_size: int,
) -> RunTracker:
    """Return rank 0's tracker of a training that starts or resumes.

    Args:
        own: whether the run resumes from a checkpoint of its own folder.
    """
    identity = wandb_client.identify(
        settings, manifest, own=own, checkpoint_id=progress.tracker_id, world_size=world_size
    )
    folder = Path(settings.run.out)
    known = progress.step - (progress.unmeasured is not None)  # the row of an unmeasured step is written again
    is_missing = own and known > 0 and not (folder / METRICS_FILE).exists()
    tracker = RunTracker(folder, identity, track=settings.track, total_steps=last_step, resumed_step=known)
    if is_missing:
        tracker.say(f"WARNING: {folder / METRICS_FILE} is missing: the rows up to step {known} are lost")
    return tracker


class TrackerScope:
    """`with TrackerScope(tracker):` closes the tracker with its exit code, or with 1 after an error."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def __enter__(self) -> Tracker:
        return self._tracker

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tracker.close(self._tracker.exit_code if error is None else 1)


class Display:
    """Shows the step, the epoch and the time left, and below them the latest losses, speed, waiting and memory.

    Args:
        total_steps: number of steps of the run.
        done: number of steps done before this start, which do not affect the estimate of the time left.
    """

    def __init__(self, console: Console, *, total_steps: int, done: int) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("starting", total=total_steps, completed=done)
        self._figures: dict[str, str] = {}
        self._live = Live(self._drawn(), console=console, transient=True, refresh_per_second=_REFRESHES_PER_S)
        self._live.start()

    def print(self, message: str) -> None:
        """Print a message above the display, without markup. A single line wraps between words; a block keeps its
        lines."""
        self._live.console.print(message, markup=False, highlight=False, soft_wrap="\n" in message)

    def advance(self, step: int, text: str) -> None:
        self._bar.update(self._task, completed=step, description=text)

    def update(self, row: Mapping[str, float]) -> None:
        """Show the figures of a row; figures that it lacks keep their values."""
        self._figures |= figures(row)
        self._live.update(self._drawn())

    def close(self) -> None:
        self._live.stop()

    def _drawn(self) -> Group:
        words = "  ".join(self._figures.values())
        return Group(self._bar, Text(words, style="dim", no_wrap=True, overflow="ellipsis"))


def figures(row: Mapping[str, float]) -> dict[str, str]:
    """Return the figures of a row for the second line, which has at most 78 characters for usual values."""
    forms = {
        "train/loss": "loss {:.3f}",
        "val/loss": "val {:.3f}",
        "val/accuracy": "accuracy {:.1%}",
        "train/images_per_s": "{:.4g} images/s",
        "train/wait_fraction": "waiting {:.1%}",
        "memory/peak_mb": "{:.0f} MB",
    }
    return {name: form.format(row[name]) for name, form in forms.items() if name in row}
