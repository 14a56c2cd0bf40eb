"""The table of all metrics, and the append-only files of a run. Does not import torch."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import deque
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from wasteddp.errors import StorageError
from wasteddp.files import open_descriptor, read_regular, read_rows, sync_folder, write_atomically

# Every metric of a run: (unit, meaning). No other metric may be logged. A * stands for a rank or a class.
METRICS: dict[str, tuple[str, str]] = {
    "epoch": ("epochs", "epochs done, including the fraction of the current one"),
    "lr": ("1", "learning rate of the step"),
    "train/loss": ("nats", "mean over the global batches since the last row"),
    "train/grad_norm": ("1", "norm of the gradient before clipping, at the step"),
    "train/images_per_s": ("images/s", "of all ranks, since the last row"),
    "train/step_ms": ("ms", "mean time of a step since the last row, including all waits"),
    "train/step_ms_p50": ("ms", "median time of a step since the last row; median of the ranks"),
    "train/step_ms_p95": ("ms", "95th percentile of the time of a step since the last row; of the slowest rank"),
    "train/wait_fraction": (
        "1",
        "fraction of the time spent waiting for data, not for the GIL or a core; mean of the ranks",
    ),
    "train/wait_fraction_max": ("1", "the same of the rank that waited longest"),
    "train/starved_fraction": (
        "1",
        "fraction of the forward passes' time in which the loop's thread did not run, because other threads held the "
        "GIL or the cores (or it waited for a compiler, SyncBatchNorm's messages, or the other threads of a CPU "
        "operation); the rest of a step is not included; maximum of the ranks",
    ),
    "train/damaged": ("samples", "training samples replaced since the run started"),
    "coverage/samples": ("samples", "samples that all ranks trained on in the epoch"),
    "coverage/expected": ("samples", "samples of that epoch according to the manifest and the plan"),
    "coverage/replaced": ("samples", "damaged samples of that epoch that were replaced"),
    "coverage/changed": (
        "1",
        "1: the order was changed within the epoch (--accept-changes): its images were not checked",
    ),
    "coverage/ok": ("1", "1: each sample exactly as often as planned, by count and hash; 0: the run stops"),
    "val/loss": ("nats", "mean cross-entropy over the split, without smoothing or weights"),
    "val/accuracy": ("1", "fraction of the split that is predicted correctly"),
    "val/macro_recall": ("1", "mean recall of the classes"),
    "val/macro_f1": ("1", "mean F1 of the classes"),
    "val/recall/*": ("1", "recall of one class"),
    "val/samples": ("samples", "samples counted, equal to the number in the manifest"),
    "val/seconds": ("s", "time of the evaluation"),
    "best/value": ("1", "best value of evaluate.metric so far"),
    "checkpoint/stall_ms": ("ms", "time that the loop waited for the last save"),
    "checkpoint/seconds": ("s", "time of the last save in the background, until the checkpoint was on disk"),
    "rank/*/images_per_s": ("images/s", "of one rank, in the time that it did not wait for data, since the last row"),
    "rank/*/wait_fraction": ("1", "fraction of the time that one rank waited for data"),
    "memory/peak_mb": ("MB", "peak memory of a process since its start, on the GPU or else resident; maximum of ranks"),
    "checkpoint/failed": ("saves", "saves that failed since this start, for lack of space or permission"),
    "train/skipped": ("steps", "diverged steps that were skipped since the run started"),
    "train/rollbacks": ("times", "number of times that the run rolled back because it diverged"),
    "attempt": ("starts", "number of starts of this run, including this one"),
}


class Journal:
    """An append-only text file. Lines that cannot be written, as on a full disk, wait in memory.

    It never raises once it is open: training continues without its log. Any thread may append: the loop and the threads
    that save and that wait for W&B do.

    Args:
        path: the file; created if it is missing.
        warn: receives a message each time that writing starts to fail or works again.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._descriptor = open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sync_folder(path.parent)
        self._waiting: deque[bytes] = deque()
        self._fails = False
        self._lost_sync = False  # a sync failed: the kernel may have dropped what it could not write
        self._lock = threading.Lock()

    def append(self, text: str) -> None:
        """Append a whole line: if the disk takes only a part of it, that part is removed and the line waits."""
        with self._lock:
            self._waiting.append(text.encode())
            self._write_what_waits(sync=False)

    def sync(self) -> None:
        """Flush the appended lines to the disk, so that they survive a power failure."""
        with self._lock:
            self._write_what_waits(sync=True)

    def close(self) -> None:
        with self._lock:
            self._write_what_waits(sync=True)
            if self._waiting:
                self._warn(f"{self._path}: {len(self._waiting)} lines could not be written and are lost")
            os.close(self._descriptor)
            self._descriptor = -1  # a late write fails instead of going into a file that was opened since

    def _write_what_waits(self, *, sync: bool) -> None:
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
            if sync:
                self._sync()
        except (OSError, StorageError) as error:
            if not self._fails:
                self._warn(
                    f"WARNING: {self._path} cannot be written: {_reason(error)}; its lines wait in memory and training "
                    "continues: free some space"
                )
            self._fails = True
        else:
            if self._fails:
                self._warn(f"{self._path} can be written again; no line is missing")
            self._fails = False

    def _sync(self) -> None:
        if self._lost_sync:  # another fsync would succeed and prove nothing: write the whole file again
            write_atomically(self._path, read_regular(self._path))
            os.close(self._descriptor)
            self._descriptor = open_descriptor(self._path, os.O_WRONLY | os.O_APPEND)
            self._lost_sync = False
        try:
            os.fsync(self._descriptor)
        except OSError:
            self._lost_sync = True
            raise

    def _write(self, line: bytes) -> None:
        before = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            os.ftruncate(self._descriptor, before)
            raise


def roll_back(path: Path, step: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Remove the rows after `step`, and lines that are not rows. Return the remaining rows.

    Damaged lines are kept in a file next to `path`. A last line that a kill cut off is not one of them: it is after the
    last checkpoint.

    Args:
        say: receives a line about damaged lines.
    """
    if not path.exists():
        return []
    damaged: list[str] = []
    rows = [row for row in read_rows(path, "step", damaged=damaged.append) if row["step"] <= step]
    if lost := [line for line in damaged if line.endswith("\n")]:
        aside = path.with_name(f"{path.stem}-damaged{path.suffix}")
        with aside.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(lost)
            file.flush()
            os.fsync(file.fileno())
        say(f"WARNING: {path}: {len(lost)} damaged line(s) are not rows of metrics; they are moved to {aside.name}")
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def _reason(error: Exception) -> str | None:
    cause = error.__cause__ if isinstance(error, StorageError) else error
    return cause.strerror if isinstance(cause, OSError) else str(error)


def is_known(name: str) -> bool:
    """Whether METRICS has a metric of this name."""
    return name in METRICS or any("*" in known and fnmatchcase(name, known) for known in METRICS)
