"""A text file that only grows, on a disk that may be full for a while: what cannot be written waits in memory.

The one table of metrics: what a run writes, charts and dashboards show. No torch.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

# Every metric that a run writes: (unit, meaning). Nothing else may be logged. A * stands for a rank or a class.
METRICS: dict[str, tuple[str, str]] = {
    "epoch": ("epochs", "epochs done, with the fraction of the present one"),
    "lr": ("1", "learning rate of the step"),
    "train/loss": ("nats", "mean over the global batches since the last row"),
    "train/grad_norm": ("1", "norm of the gradient before clipping, at the step"),
    "train/images_per_s": ("images/s", "of all ranks, since the last row"),
    "train/step_ms": ("ms", "mean time of a step since the last row, whatever it waited for"),
    "train/step_ms_p50": ("ms", "median of the steps since the last row, of all ranks"),
    "train/step_ms_p95": ("ms", "95th percentile of the steps since the last row, of the slowest rank"),
    "train/wait_fraction": (
        "1",
        "part of the time spent waiting for data, not for the GIL or a core; mean of the ranks",
    ),
    "train/wait_fraction_max": ("1", "the same of the rank that waited most"),
    "train/starved_fraction": (
        "1",
        "part of the forward passes' time in which the loop's thread was not on a core: others held the GIL or the "
        "cores (or it waited for a compiler, SyncBatchNorm's messages, or the other threads of an operation on a CPU); "
        "nothing of the rest of a step; of the rank that starved most",
    ),
    "train/damaged": ("samples", "training samples replaced since the run began"),
    "coverage/samples": ("samples", "trained on in the epoch that ended, by all ranks"),
    "coverage/expected": ("samples", "of that epoch, by the manifest and the plan"),
    "coverage/replaced": ("samples", "of these: damaged, another stood in"),
    "coverage/changed": ("1", "1: the order was changed within the epoch (--accept-changes), which is not proved"),
    "coverage/ok": ("1", "1: each sample exactly as often as planned, by count and hash; 0: the run stops"),
    "val/loss": ("nats", "mean cross-entropy over the split, without smoothing or weights"),
    "val/accuracy": ("1", "part of the split that is right"),
    "val/macro_recall": ("1", "mean of the classes' recalls"),
    "val/macro_f1": ("1", "mean of the classes' F1"),
    "val/recall/*": ("1", "recall of one class"),
    "val/samples": ("samples", "counted, equal to the manifest's"),
    "val/seconds": ("s", "time of the evaluation"),
    "best/value": ("1", "best value of evaluate.metric so far"),
    "checkpoint/stall_ms": ("ms", "time that the loop waited to hand over the last checkpoint"),
    "checkpoint/seconds": ("s", "that the last checkpoint took in the background, from being handed over to the disk"),
    "rank/*/images_per_s": ("images/s", "that one rank trained on while it did not wait for data, since the last row"),
    "rank/*/wait_fraction": ("1", "part of the time that one rank waited for data"),
    "memory/peak_mb": ("MB", "most that a process held since its start, of all ranks: on the GPU, else of main memory"),
    "checkpoint/failed": ("saves", "that could not be written since this start, for want of space or permission"),
    "train/skipped": ("steps", "steps skipped because they diverged, since the run began"),
    "train/rollbacks": ("times", "times that the run went back because it diverged"),
    "attempt": ("starts", "starts of this run, this one included"),
}


class Journal:
    """Never raises once it is open: a training is not worth less because a line of its log cannot be written.

    Any thread may append: the loop, the one that saves and the one that waits for W&B all have something to say.

    Args:
        path: of the file; made if missing, otherwise continued.
        warn: takes a message, once each time that writing begins to fail or goes on.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting: deque[bytes] = deque()
        self._fails = False
        self._lock = threading.Lock()

    def append(self, text: str) -> None:
        """Whole or not at all: a line that the disk takes only a part of is taken back, and waits."""
        with self._lock:
            self._waiting.append(text.encode())
            self._write_what_waits(sync=False)

    def sync(self) -> None:
        """Makes what was appended survive a power cut, as far as the disk takes it."""
        with self._lock:
            self._write_what_waits(sync=True)

    def close(self) -> None:
        with self._lock:
            self._write_what_waits(sync=True)
            if self._waiting:
                self._warn(f"{self._path}: {len(self._waiting)} lines could not be written and are lost")
            os.close(self._descriptor)
            self._descriptor = -1  # a thread that comes late is told, and does not write into whatever is opened next

    def _write_what_waits(self, *, sync: bool) -> None:
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
            if sync:
                os.fsync(self._descriptor)
        except OSError as error:
            if not self._fails:
                self._warn(
                    f"WARNING: {self._path} cannot be written: {error.strerror}; its lines wait in memory, training "
                    "goes on: free some space"
                )
            self._fails = True
        else:
            if self._fails:
                self._warn(f"{self._path} can be written again; nothing of it is missing")
            self._fails = False

    def _write(self, line: bytes) -> None:
        before = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            os.ftruncate(self._descriptor, before)
            raise


def is_known(name: str) -> bool:
    """Whether METRICS has it."""
    return name in METRICS or any("*" in known and fnmatchcase(name, known) for known in METRICS)
