"""The progress display of a run: two lines at the bottom of a terminal. Other output gets plain lines."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_REFRESHES_PER_S = 2  # a refresh takes 1 to 2 ms of one core


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
