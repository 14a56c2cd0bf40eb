"""TensorBoard and W&B as mirrors of metrics.jsonl: the same names, steps and times. A failure in them ends no training.

W&B never prompts and never blocks the loop, which only queues rows: a thread checks whether W&B is available and which
rows it lacks, and sends them. The end of the run waits for the thread, for at most `track.finish_s`.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wasteddp.errors import SettingsError
from wasteddp.settings import Track
from wasteddp.training.tracking.wandb_client import (
    Mode,
    RunIdentity,
    asked_mode,
    choose,
    keep_inside,
    open_run,
    reason_of,
    sender_lock,
    stop_service,
)
from wasteddp.training.tracking.wandb_sync import Delivery, Row

_SPARE_S = 1.0  # between wandb's time limit and track.finish_s


@dataclass(frozen=True, slots=True)
class _End:
    exit_code: int


class WandbMirror:
    """One W&B run, online if possible and offline otherwise.

    Args:
        folder: the folder of the run; all files of wandb stay in it.
        history: rows that are already in metrics.jsonl.
        say: receives lines for the log, also from this class's thread.
    """

    def __init__(
        self, folder: Path, identity: RunIdentity, track: Track, *, history: Sequence[Row], say: Callable[[str], None]
    ) -> None:
        self._folder, self._identity, self._track, self._say = folder, identity, track, say
        self._asked = asked_mode(track.wandb)
        self._queue: queue.SimpleQueue[Row | _End] = queue.SimpleQueue()
        self._lock: IO[bytes] | None = None
        self._failed = False
        self._over = threading.Event()  # the run has ended, even if the thread still waits
        self._thread: threading.Thread | None = None
        self._resumed_step = history[-1]["step"] if history else -1
        if self.is_on:
            for row in history:
                self._queue.put(row)
            self._thread = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
            self._thread.start()

    @property
    def is_on(self) -> bool:
        return self._asked != "disabled"

    def log(self, row: Row) -> None:
        if self._thread:
            self._queue.put(row)

    def finish(self, exit_code: int) -> None:
        """Wait until W&B has everything, for at most track.finish_s."""
        if not self._thread:
            return
        self._queue.put(_End(exit_code))
        self._thread.join(self._track.finish_s)
        if self._thread.is_alive():
            self._say(self._too_slow)
            self._over.set()
            stop_service()
        self._say = lambda _: None  # the log is closed next
        if self._lock:
            self._lock.close()

    @property
    def _later(self) -> str:
        return f"send it later with: wasteddp sync {self._folder}"

    @property
    def _too_slow(self) -> str:
        return f"W&B: not all data was sent within {self._track.finish_s:g} s (track.finish_s); {self._later}"

    def _work(self) -> None:
        """Run the thread. It handles all errors of wandb."""
        try:
            delivery = self._open()
        except Exception as error:
            self._say(f"W&B: not available for run {self._identity.id} ({reason_of(error)}); {self._later}")
            return
        while True:
            item = self._queue.get()
            if isinstance(item, _End):
                with self._harmless():
                    if self._track.model:
                        delivery.model()
                with self._harmless():
                    delivery.finish(item.exit_code)
                return
            with self._harmless():
                delivery.row(item)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            self._say(self._too_slow)
        except Exception as error:
            if not self._failed:  # report only the first row that fails
                self._say(f"W&B: {reason_of(error)}; training continues; {self._later}")
            self._failed = True

    def _open(self) -> Delivery:
        keep_inside(self._folder)
        mode = choose(self._asked)
        if mode.is_online:
            self._lock = sender_lock(self._folder, self._say)
            if not self._lock:
                mode = Mode("offline", "another process is sending this run's rows")
        run: Any = None
        if mode.is_online:
            try:
                run = self._opened(mode)
            except Exception as error:
                if self._over.is_set():
                    raise
                mode = Mode("offline", reason_of(error))
        if run is None:
            run = self._opened(mode)
        later = "" if mode.is_online else f"; {self._later}"
        self._say(f"W&B: {mode.name}, run {self._identity.id} ({mode.reason}){later}")
        # An offline run cannot query W&B; the earlier rows are in the files of the earlier attempts.
        next_step = run.starting_step if mode.is_online else self._resumed_step + 1
        delivery = Delivery(run, self._folder, self._identity, next_step)
        if mode.is_online:
            with self._harmless():
                delivery.dataset()
        return delivery

    def _opened(self, mode: Mode) -> Any:
        limit_s = max(self._track.finish_s - _SPARE_S, self._track.finish_s / 2)
        return open_run(self._folder, self._identity, mode, finish_s=limit_s, strict=True)


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
