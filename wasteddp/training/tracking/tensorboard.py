"""TensorBoard as a mirror of metrics.jsonl: the same names, steps and times, in RUN/tensorboard/."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wasteddp.errors import SettingsError


class TensorBoardMirror:
    """Writes event files for `tensorboard --logdir RUN`. A failure in it does not end a training.

    Args:
        folder: the folder of the run.
        resumed_step: rows after it are withdrawn, because they will be written again.
        history: rows of metrics.jsonl up to this step, for a mirror that is enabled during a run.

    Raises:
        SettingsError: the package is not installed.
    """

    def __init__(
        self, folder: Path, *, resumed_step: int, history: Sequence[Mapping[str, Any]], say: Callable[[str], None]
    ) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise SettingsError(
                "track.tensorboard is true and the package tensorboard is not installed",
                "the run could not write event files for TensorBoard",
                "pip install 'wasteddp[tensorboard]', or set track.tensorboard to false",
            )
        from torch.utils.tensorboard import SummaryWriter

        self._say = say
        out = folder / "tensorboard"
        goes_on = any(out.glob("events.out.tfevents.*"))
        # purge_step withdraws the rows that an earlier start wrote after its last checkpoint.
        self._writer: Any = SummaryWriter(str(out), purge_step=resumed_step + 1 if goes_on else None)
        if not goes_on:
            for row in history:
                self.log(row)
        say(f"TensorBoard: tensorboard --logdir {folder}")

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.jsonl."""
        for name, value in row.items():
            if name not in ("step", "time_s"):
                self._do("add_scalar", name, value, row["step"], walltime=row["time_s"])

    def flush(self) -> None:
        """Flush the rows before a checkpoint: they will not be written again."""
        self._do("flush")

    def close(self) -> None:
        self._do("close")

    def _do(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments, **named)
        except Exception as error:
            self._writer = None
            self._say(f"TensorBoard stops: {type(error).__name__}: {error}; metrics.jsonl has every row")
