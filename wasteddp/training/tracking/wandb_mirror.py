"""W&B as a mirror of a run's folder: never a prompt, never a wait in the loop, never the end of a training.

All of it happens in a thread of its own: finding out whether W&B can be had, what it lacks, and sending. The loop hands
over rows and goes on; only the end of the run waits for it, and not for longer than `track.finish_s`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wasteddp.settings import Track
from wasteddp.training.tracking.run_id import Label
from wasteddp.training.tracking.wandb_client import (
    Mode,
    asked_mode,
    choose,
    keep_inside,
    open_run,
    reason_of,
    sender_lock,
    stop_service,
)
from wasteddp.training.tracking.wandb_sync import Delivery, Row

_SPARE_S = 1.0  # between wandb's own limit and ours


@dataclass(frozen=True, slots=True)
class _End:
    exit_code: int


class WandbMirror:
    """One W&B run, online where it can be, offline where it cannot.

    Args:
        folder: of the run; all that wandb writes stays in it.
        history: rows that are already in metrics.jsonl.
        say: takes a line for the log, from this class's thread too.
    """

    def __init__(
        self, folder: Path, label: Label, track: Track, *, history: Sequence[Row], say: Callable[[str], None]
    ) -> None:
        self._folder, self._label, self._track, self._say = folder, label, track, say
        self._asked = asked_mode(track.wandb)
        self._queue: queue.SimpleQueue[Row | _End] = queue.SimpleQueue()
        self._lock: IO[bytes] | None = None
        self._failed = False
        self._over = threading.Event()  # the run has ended, whatever the thread is still waiting for
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
        """Waits until W&B has everything, or until track.finish_s is over."""
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
        return f"W&B: it did not take everything within {self._track.finish_s:g} s (track.finish_s); {self._later}"

    def _work(self) -> None:
        """The thread. Whatever goes wrong in wandb ends here."""
        try:
            delivery = self._open()
        except Exception as error:
            self._say(f"W&B: none, run {self._label.id} ({reason_of(error)}); {self._later}")
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
            if not self._failed:  # once: each row would say it again
                self._say(f"W&B: {reason_of(error)}; training goes on; {self._later}")
            self._failed = True

    def _open(self) -> Delivery:
        keep_inside(self._folder)
        mode = choose(self._asked)
        if mode.is_online:
            self._lock = sender_lock(self._folder)
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
        self._say(f"W&B: {mode.name}, run {self._label.id} ({mode.reason}){later}")
        # An offline run cannot ask what W&B has; what was before it lies in the attempts before it.
        next_step = run.starting_step if mode.is_online else self._resumed_step + 1
        delivery = Delivery(run, self._folder, self._label, next_step)
        if mode.is_online:
            with self._harmless():
                delivery.dataset()
        return delivery

    def _opened(self, mode: Mode) -> Any:
        limit_s = max(self._track.finish_s - _SPARE_S, self._track.finish_s / 2)
        return open_run(self._folder, self._label, mode, finish_s=limit_s, strict=True)
