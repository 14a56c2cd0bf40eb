"""Notices within run.timeout_s that a rank failed, hung or vanished, says which one and where, and stops the others.

Each rank has a thread that once a second posts on the board how far its loop has come, reads whether somebody failed,
and looks after the rank after it: four small messages a second and rank, whatever their number. All ranks are asked
only when something is wrong. Every rank passes the same marks in the same order, so those with the fewest are the ones
that the others wait for.

Time in which this process did not run at all (a suspended job) counts against nobody.
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
from wasteddp.training.watchdog import failures, hard_exit
from wasteddp.training.watchdog.heartbeat import Beat, Failure, HeartbeatStore, LostBoardError, answers
from wasteddp.training.watchdog.signals import STOP

# The start, the first step and saves may take so many times run.timeout_s: downloads, compilation, slow disks.
SLOW_FACTOR = 6
_BEAT_S = 1.0
_SILENT_S = 8.0  # once the launcher has asked all to stop, because one ended, silence for so long is the end of a rank
_STUCK_S = 5.0  # that a rank which hears of a failure is given to meet it by itself
_UNWINDING_S = 90.0  # that a failed rank is given to close its dashboard and its files
_CONNECTING_S = 3.0
_STOPPED_S = 10.0  # that a process which is asked to stop waits for a board
_LAUNCHER_S = 60.0  # that it waits for one that the launcher keeps, which had it before it started any process
_LOST_BEATS = 3
_DISK_S = 3.0  # that the run's disk is given to take a line

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a loop is."""

    number: int = 0
    place: str = "starting"
    slow: bool = True


class Watchdog:
    """One rank's. `address` is the board's; None where there is nobody to tell."""

    def __init__(self, rank: int = 0, world_size: int = 1, *, address: tuple[str, int] | None = None) -> None:
        self._rank, self._world_size, self._address = rank, world_size, address
        self._mark, self._step, self._num_beats = Mark(), 0, 0
        self._settings = Settings()
        self._board: HeartbeatStore | None = None
        self._thread: threading.Thread | None = None
        self._connected, self._closed = threading.Event(), threading.Event()
        self._word = threading.Lock()  # taken once, by whoever speaks
        self._exit_code: int | None = None
        self._leave_in_s = float("inf")
        self.detail: Callable[[], str] = str  # what the loader's threads are at

    @classmethod
    def from_environment(cls) -> Watchdog:
        """Of a process that a launcher started, or of the only one."""
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        rank, world_size = environment.launched("RANK", 0), environment.launched("WORLD_SIZE", 1)
        known = world_size > 1 and host and port.isdigit()
        return cls(rank, world_size, address=(host, int(port)) if known else None)

    def start(self, settings: Settings) -> None:
        """Begins to watch."""
        self._settings = settings
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the watch. A rank that did not fail tells the others that it left in peace."""
        self._closed.set()
        if self._thread:
            self._thread.join(_CONNECTING_S)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.failed(error)  # the others wait: tell them before anything slow is closed

    # --- where the loop is: nothing here waits or sends -------------------------------------------------------------

    def at(self, place: str, *, slow: bool = False) -> None:
        """The loop has come to `place`."""
        self._mark = Mark(self._mark.number + 1, place, slow)

    @property
    def whereabouts(self) -> str:
        return f"rank {self._rank}, step {self._step}, {self._mark.place}"

    def meet(self) -> Mark:
        """Before a collective. What it returns goes to `met`, after it."""
        before = self._mark
        self.at("waiting for the other ranks", slow=before.slow)
        return before

    def met(self, before: Mark) -> None:
        self.at(before.place, slow=before.slow)

    def steps(self, batches: Iterator[Item], first_step: int) -> Iterator[Item]:
        """The same batches; `first_step` is the number of the first. What is done with it may be slow."""
        self._step = first_step + 1
        for batch in self.over(batches, "waiting for data"):
            self.at("computing", slow=self._mark.slow)
            yield batch
            self._step += 1

    def over(self, items: Iterator[Item], place: str) -> Iterator[Item]:
        """The same items; each wait for one, and what is done with it, is `place`. The first may be slow."""
        self.at(place, slow=True)
        for item in items:
            yield item
            self.at(place)

    # --- a failure of this rank -------------------------------------------------------------------------------------

    def failed(self, error: Exception) -> int:
        """Tells the others, says once for all ranks what happened, and returns the exit code. Only the first counts."""
        if self._exit_code is None:
            elsewhere = self._cause_elsewhere() if failures.comes_from_a_peer(error) else None
            if elsewhere and self._exit_code is None:
                self._log(elsewhere.message)
            self._exit_code = elsewhere.exit_code if elsewhere else self._tell(error)
        self._leave_in_s = _UNWINDING_S
        return self._exit_code

    def _tell(self, error: Exception) -> int:
        if self._thread and self._address:
            self._connected.wait(_CONNECTING_S)
        known = failures.explained(error, self._settings, self._mark.place)
        code = EXIT_USER_ERROR if isinstance(known, WastedError) else EXIT_FAILED
        where = self.whereabouts if self._world_size > 1 else ""
        if self._speaks(Failure(self._rank, failures.told(known, where), code)) and code == EXIT_FAILED:
            traceback.print_exception(error)
        return code

    def _cause_elsewhere(self) -> Failure | None:
        """What broke a collective: a failure that another rank told or tells soon, or a rank that has fallen silent."""
        try:
            before = self._board.beats() if self._board else []
            for _ in range(4):
                if failure := self._board.failure() if self._board else None:
                    return failure
                time.sleep(_BEAT_S)
            return self._accuse(before, only_silent=True)
        except LostBoardError:
            return None

    def _accuse(self, before: list[Beat | None], *, only_silent: bool = False) -> Failure | None:
        """Tells which ranks the others wait for, from two looks at the board a few beats apart."""
        found = failures.accusation(before, self._board.beats() if self._board else [], only_silent=only_silent)
        if not found:
            return None
        failure = Failure(self._rank, found, EXIT_FAILED)
        self._speaks(failure)
        return failure

    def _speaks(self, failure: Failure) -> bool:
        """Whether this rank's word is the first; if so it is said. The loop and the thread may both come to know."""
        if not self._word.acquire(blocking=False):
            return False
        try:
            first = self._board.claim(failure) == failure if self._board else self._rank == 0
        except LostBoardError:
            first = True
        if first:
            print(f"error: {failure.message}", file=sys.stderr, flush=True)
        self._log(failure.message)
        return first

    # --- the thread -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        timeout_s = self._settings.run.timeout_s
        if self._address:
            self._board = self._reached_board(*self._address)
        self._connected.set()
        seen, quiet_s, lost, silent_s = self._mark, 0.0, 0, 0.0
        neighbour: Beat | None = None
        before = time.monotonic()
        with suppress(LostBoardError):
            self._post(0.0)  # at once: a rank that dies soon is known to have come
        while not self._closed.wait(_BEAT_S):
            # not more than two beats: in what is missing this process was stopped, and could not move
            passed_s, before = min(time.monotonic() - before, 2 * _BEAT_S), time.monotonic()
            seen, quiet_s = (seen, quiet_s + passed_s) if self._mark is seen else (self._mark, 0.0)
            heard, beat = None, neighbour
            try:
                self._post(quiet_s)
                if self._board:
                    heard, beat = self._board.failure(), self._board.beat((self._rank + 1) % self._world_size)
                lost = 0
            except LostBoardError:
                lost += 1
                if lost == _LOST_BEATS and not STOP:
                    STOP.signal_name = "the end of its launcher"
            neighbour, silent_s = (beat, silent_s + passed_s) if beat == neighbour else (beat, 0.0)
            gone = neighbour is not None and not neighbour.left and silent_s > (_SILENT_S if STOP else timeout_s)
            if self._exit_code is None and heard:
                self._exit_code, self._leave_in_s = heard.exit_code, _STUCK_S
                self._log(heard.message)
            elif self._exit_code is None and (gone or quiet_s > timeout_s * (SLOW_FACTOR if seen.slow else 1)):
                self._stop_all(quiet_s)
            self._leave_in_s -= passed_s
            if self._exit_code is not None and self._leave_in_s < 0:
                hard_exit.leave_with_words(self._exit_code, self._run, self._rank)
        with suppress(LostBoardError):
            self._post(0.0, left=self._exit_code is None)

    def _reached_board(self, host: str, port: int) -> HeartbeatStore | None:
        """Waits for it, since rank 0 may keep it and come late. None where it never comes: each rank watches itself.

        The loop joins the others by the same address, and torch waits there for as long as a slow start may take. If
        the launcher is gone that is for nobody: this process leaves.
        """
        patience_s = SLOW_FACTOR * self._settings.run.timeout_s
        began, launchers = time.monotonic(), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        while not self._closed.wait(_BEAT_S / 10):
            if answers(host, port):
                with suppress(LostBoardError):
                    return HeartbeatStore.of_launcher(host, port, self._world_size, patience_s=_LAUNCHER_S)
            waited_s = time.monotonic() - began
            gone = waited_s > (_STOPPED_S if STOP else _LAUNCHER_S if launchers else patience_s)
            if gone and self._mark.number == 0 and self._exit_code is None:
                where = f"{host}:{port} for {waited_s:.0f} s"
                self._speaks(Failure(self._rank, failures.nobody_to_join(where, STOP.signal_name), EXIT_FAILED))
                hard_exit.leave_with_words(EXIT_FAILED, self._run, self._rank)
            if waited_s > patience_s:
                break
        return None

    def _log(self, message: str) -> None:
        if self._rank == 0:
            hard_exit.within(_DISK_S, lambda: hard_exit.append_to_log(self._run, f"error: {message}"))

    @property
    def _run(self) -> Path:
        return Path(self._settings.run.out)

    def _post(self, quiet_s: float, *, left: bool = False) -> None:
        if self._board:
            self._num_beats += 1
            self._board.post(self._rank, self._beat(quiet_s, left=left))

    def _beat(self, quiet_s: float, *, left: bool = False) -> Beat:
        mark = self._mark
        return Beat(self._num_beats, mark.number, self._step, mark.place, round(quiet_s, 1), self.detail(), left)

    def _stop_all(self, quiet_s: float) -> None:
        """Something is wrong: finds out what, says it, and leaves, unless another rank was faster."""
        try:
            before = self._board.beats() if self._board else []
            for _ in range(3 if self._board else 0):
                time.sleep(_BEAT_S)
                self._post(quiet_s)
            failure = self._accuse(before)
        except LostBoardError:
            failure = None
        if failure is None:  # alone, or cut off from the others
            failure = Failure(self._rank, failures.standstill(self._rank, self._beat(quiet_s)), EXIT_FAILED)
            self._speaks(failure)
        if self._exit_code is None:
            self._exit_code, self._leave_in_s = failure.exit_code, -1.0
