"""Detects within run.timeout_s that a rank failed, hung or vanished, reports which one and where, and stops the others.

Each rank has a thread that once a second writes the progress of its loop to the store, checks whether a rank has
failed, and reads the beat of the next rank: four small messages per second and rank, whatever the number of ranks. The
beats of all ranks are read only after a failure. Every rank passes the same marks in the same order, so the others wait
for the ranks with the fewest marks.

Time in which this process did not run at all (a suspended job) does not count.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from wasteddp import environment
from wasteddp.errors import EXIT_FAILED, EXIT_USER_ERROR, WastedError
from wasteddp.settings import Settings
from wasteddp.training.watchdog import exits, failures
from wasteddp.training.watchdog.exits import STOP
from wasteddp.training.watchdog.failures import Beat, Failure, HeartbeatStore, LostStoreError, answers

# The start, the first step and saves may take this many times run.timeout_s: downloads, compilation, slow disks.
SLOW_FACTOR = 6
_BEAT_S = 1.0
_SILENT_S = 8.0  # after which a silent rank counts as ended, once the launcher has stopped all because one ended
_STUCK_S = 5.0  # for a rank to run into another rank's failure itself
_UNWINDING_S = 90.0  # for a failed rank to close its dashboard and its files
_CONNECTING_S = 3.0
_STOPPED_S = 10.0  # that a process waits for the store after a stop signal
_LAUNCHER_S = 60.0  # that it waits for the launcher's store, which exists before the launcher starts any process
_LOST_BEATS = 3
_LEAVING_S = 2.0  # that the process of the store waits at its end for the others
_PRINT_S = 3.0  # limit for printing: nobody may read the output
_DISK_S = 3.0  # for the run's disk to write a line

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Mark:
    """The position of a loop."""

    number: int = 0
    place: str = "starting"
    slow: bool = True


class Watchdog:
    """The watchdog of one rank. `address` is that of the store; None for a single process."""

    def __init__(self, rank: int = 0, world_size: int = 1, *, address: tuple[str, int] | None = None) -> None:
        self._rank, self._world_size, self._address = rank, world_size, address
        self._mark, self._step, self._num_beats = Mark(), 0, 0
        self._settings = Settings()
        self._store: HeartbeatStore | None = None
        self._thread: threading.Thread | None = None
        self._connected, self._closed = threading.Event(), threading.Event()
        self._reported = threading.Lock()  # taken once, by the thread that reports a failure
        self._exit_code: int | None = None
        self._leave_in_s = float("inf")
        self.detail: Callable[[], str] = str  # describes what the loader's threads are doing

    @classmethod
    def from_environment(cls) -> Watchdog:
        """Create the watchdog from the launcher's environment variables."""
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        rank, world_size = environment.launched("RANK", 0), environment.launched("WORLD_SIZE", 1)
        known = world_size > 1 and host and port.isdigit()
        return cls(rank, world_size, address=(host, int(port)) if known else None)

    def start(self, settings: Settings) -> None:
        """Start the thread."""
        self._settings = settings
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. A rank that did not fail reports to the others that it has left."""
        self._closed.set()
        if self._thread:
            self._thread.join(_CONNECTING_S)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.failed(error)  # the others are waiting: report it before anything slow is closed

    # --- the position of the loop: these functions neither wait nor send --------------------------------------------

    def at(self, place: str, *, slow: bool = False) -> None:
        """Record that the loop has reached `place`."""
        self._mark = Mark(self._mark.number + 1, place, slow)

    @property
    def whereabouts(self) -> str:
        return f"rank {self._rank}, step {self._step}, {self._mark.place}"

    def enter_collective(self) -> Mark:
        """Record the start of a collective. Pass the result to `leave_collective` after it."""
        before = self._mark
        self.at("waiting for the other ranks", slow=before.slow)
        return before

    def leave_collective(self, before: Mark) -> None:
        self.at(before.place, slow=before.slow)

    def steps(self, batches: Iterator[Item], first_step: int) -> Iterator[Item]:
        """Yield the same batches and record their steps, from `first_step`. The first step may be slow."""
        self._step = first_step + 1
        for batch in self.over(batches, "waiting for data"):
            self.at("computing", slow=self._mark.slow)
            yield batch
            self._step += 1

    def over(self, items: Iterator[Item], place: str) -> Iterator[Item]:
        """Yield the same items and record `place` for each. The first item may be slow."""
        self.at(place, slow=True)
        for item in items:
            yield item
            self.at(place)

    # --- a failure of this rank -------------------------------------------------------------------------------------

    def failed(self, error: Exception) -> int:
        """Report a failure of this rank to the others and, once for all ranks, to the user; return the exit code.

        Only the first failure counts.
        """
        if self._exit_code is None:
            elsewhere = self._cause_elsewhere() if failures.comes_from_a_peer(error) else None
            if elsewhere and self._exit_code is None:
                self._log(elsewhere.message)
            self._exit_code = elsewhere.exit_code if elsewhere else self._report_error(error)
        self._leave_in_s = _UNWINDING_S
        return self._exit_code

    def _report_error(self, error: Exception) -> int:
        if self._thread and self._address:
            self._connected.wait(_CONNECTING_S)
        known = failures.explain(error, self._settings, self._mark.place)
        code = EXIT_USER_ERROR if isinstance(known, WastedError) else EXIT_FAILED
        where = self.whereabouts if self._world_size > 1 else ""
        if self._report(Failure(self._rank, failures.failure_message(known, where), code)) and code == EXIT_FAILED:
            exits.within(_PRINT_S, lambda: traceback.print_exception(error))
        return code

    def _cause_elsewhere(self) -> Failure | None:
        """Return what broke a collective: a failure that another rank reports in the next seconds, or a silent rank."""
        try:
            before = self._store.beats() if self._store else []
            for _ in range(4):
                if failure := self._store.failure() if self._store else None:
                    return failure
                time.sleep(_BEAT_S)
            return self._report_blocking(before, only_silent=True)
        except LostStoreError:
            return None

    def _report_blocking(self, before: list[Beat | None], *, only_silent: bool = False) -> Failure | None:
        """Report which ranks the others wait for, from two readings of the beats a few seconds apart."""
        found = failures.describe_blocking_ranks(
            before, self._store.beats() if self._store else [], only_silent=only_silent
        )
        if not found:
            return None
        failure = Failure(self._rank, found, EXIT_FAILED)
        self._report(failure)
        return failure

    def _report(self, failure: Failure) -> bool:
        """Report a failure unless another rank has reported one; return whether this report is the first.

        The loop and the thread may both call it.
        """
        if not self._reported.acquire(blocking=False):
            return False
        try:
            first = self._store.claim(failure) == failure if self._store else self._rank == 0
        except LostStoreError:
            first = True
        self._log(failure.message)  # before the terminal, which may never take a line: a full pipe, Ctrl-S
        if first:
            exits.within(_PRINT_S, lambda: print(f"error: {failure.message}", file=sys.stderr, flush=True))
        return first

    # --- the thread -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        timeout_s = self._settings.run.timeout_s
        if self._address:
            self._store = self._connect(*self._address)
        self._connected.set()
        seen, quiet_s, lost, silent_s = self._mark, 0.0, 0, 0.0
        neighbour: Beat | None = None
        before = time.monotonic()
        with suppress(LostStoreError):
            self._post(0.0)  # immediately: also a rank that ends soon has then connected
        while not self._closed.wait(_BEAT_S):
            # at most two beats: in the rest of the time this process was suspended
            passed_s, before = min(time.monotonic() - before, 2 * _BEAT_S), time.monotonic()
            seen, quiet_s = (seen, quiet_s + passed_s) if self._mark is seen else (self._mark, 0.0)
            failure, beat = None, neighbour
            try:
                self._post(quiet_s)
                if self._store:
                    failure, beat = self._store.failure(), self._store.beat((self._rank + 1) % self._world_size)
                lost = 0
            except LostStoreError:
                lost += 1
                if lost == _LOST_BEATS and not STOP:
                    STOP.signal_name = "the end of its launcher"
            neighbour, silent_s = (beat, silent_s + passed_s) if beat == neighbour else (beat, 0.0)
            gone = neighbour is not None and not neighbour.left and silent_s > (_SILENT_S if STOP else timeout_s)
            if self._exit_code is None and failure:
                self._exit_code, self._leave_in_s = failure.exit_code, _STUCK_S
                self._log(failure.message)
            elif self._exit_code is None and (gone or quiet_s > timeout_s * (SLOW_FACTOR if seen.slow else 1)):
                self._stop_all(quiet_s)
            self._leave_in_s -= passed_s
            if self._exit_code is not None and self._leave_in_s < 0:
                exits.leave_with_stacks(self._exit_code, self._run, self._rank)
        with suppress(LostStoreError):
            self._post(0.0, left=self._exit_code is None)
            if self._exit_code is None and self._rank == 0 and not _is_launchers_store():
                self._wait_until_the_others_left()

    def _wait_until_the_others_left(self) -> None:
        """Keep the store, which ends with this process: torch prints a stack in a process that then writes to it."""
        until = time.monotonic() + _LEAVING_S
        for rank in range(1, self._world_size if self._store else 0):
            while self._store and not ((beat := self._store.beat(rank)) and beat.left):
                if time.monotonic() > until:
                    return
                time.sleep(_BEAT_S / 50)

    def _connect(self, host: str, port: int) -> HeartbeatStore | None:
        """Connect to the store, which rank 0 may create late. Returns None after a time limit; each rank then watches
        only itself.

        The loop joins the other ranks at the same address, where torch waits for as long as a slow start may take. If
        the launcher has ended, that wait is in vain and this process ends.
        """
        patience_s = SLOW_FACTOR * self._settings.run.timeout_s
        began = time.monotonic()
        while not self._closed.wait(_BEAT_S / 10):
            if answers(host, port):
                with suppress(LostStoreError):
                    return HeartbeatStore.of_launcher(host, port, self._world_size, patience_s=_LAUNCHER_S)
            waited_s = time.monotonic() - began
            gone = waited_s > (_STOPPED_S if STOP else _LAUNCHER_S if _is_launchers_store() else patience_s)
            if gone and self._mark.number == 0 and self._exit_code is None:
                where = f"{host}:{port} for {waited_s:.0f} s"
                self._report(Failure(self._rank, failures.describe_lost_launcher(where, STOP.signal_name), EXIT_FAILED))
                exits.leave_with_stacks(EXIT_FAILED, self._run, self._rank)
            if waited_s > patience_s:
                break
        return None

    def _log(self, message: str) -> None:
        if self._rank == 0:
            exits.within(_DISK_S, lambda: exits.append_to_log(self._run, f"error: {message}"))

    @property
    def _run(self) -> Path:
        return Path(self._settings.run.out)

    def _post(self, quiet_s: float, *, left: bool = False) -> None:
        if self._store:
            self._num_beats += 1
            self._store.post(self._rank, self._beat(quiet_s, left=left))

    def _beat(self, quiet_s: float, *, left: bool = False) -> Beat:
        mark = self._mark
        return Beat(self._num_beats, mark.number, self._step, mark.place, round(quiet_s, 1), self.detail(), left)

    def _stop_all(self, quiet_s: float) -> None:
        """Find out which rank hangs, report it unless another rank was faster, and end this process."""
        try:
            before = self._store.beats() if self._store else []
            for _ in range(3 if self._store else 0):
                time.sleep(_BEAT_S)
                self._post(quiet_s)
            failure = self._report_blocking(before)
        except LostStoreError:
            failure = None
        if failure is None:  # a single process, or one without a connection to the others
            failure = Failure(self._rank, failures.describe_standstill(self._rank, self._beat(quiet_s)), EXIT_FAILED)
            self._report(failure)
        if self._exit_code is None:
            self._exit_code, self._leave_in_s = failure.exit_code, -1.0


def _is_launchers_store() -> bool:
    """Whether the launcher has the store, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
