"""The store through which ranks report heartbeats and failures, and the messages of failures.

The reports go through the launcher's TCPStore, by a separate connection, because the loop may block torch's connection
for minutes. Failures are classified as errors of the device, errors of other ranks, and hung ranks.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented, not in __all__

from wasteddp.errors import DeviceMemoryError, SettingsError, WastedError, storage_error
from wasteddp.settings import Settings
from wasteddp.training.distributed import determinism

_FAILURE = "failure"
_ANSWER = timedelta(seconds=30)
_CONNECT_S = 5.0
_MOST_NAMED = 8
_PEER_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


class LostStoreError(Exception):
    """The store does not respond: its process, the launcher or rank 0, has ended."""


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat. `marks` counts the places that the loop has passed: the same sequence on every rank."""

    count: int
    marks: int
    step: int
    place: str
    quiet_s: float  # since the last mark
    detail: str = ""
    left: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure that ends the run, reported by one rank for all."""

    reported_by: int
    message: str
    exit_code: int


class HeartbeatStore:
    """The heartbeats of all ranks, and the first failure. Each method raises LostStoreError if the store has ended."""

    def __init__(self, store: Store, world_size: int) -> None:
        self._store, self._world_size = PrefixStore("wasteddp-watch", store), world_size

    @classmethod
    def of_launcher(cls, host: str, port: int, world_size: int, *, patience_s: float) -> HeartbeatStore:
        """Connect to the store of the launcher, or else of rank 0, at MASTER_ADDR and MASTER_PORT."""
        with _or_lost():
            store = TCPStore(host, port, None, False, timedelta(seconds=patience_s), wait_for_workers=False)
            store.set_timeout(_ANSWER)
        return cls(store, world_size)

    def post(self, rank: int, beat: Beat) -> None:
        with _or_lost():
            self._store.set(f"beat/{rank}", json.dumps(asdict(beat)))

    def beat(self, rank: int) -> Beat | None:
        """Return the last beat of a rank; None before its first."""
        with _or_lost():
            key = f"beat/{rank}"
            return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def beats(self) -> list[Beat | None]:
        """Return the last beats of all ranks, for the message of a failure."""
        return [self.beat(rank) for rank in range(self._world_size)]

    def failure(self) -> Failure | None:
        with _or_lost():
            return Failure(**json.loads(self._store.get(_FAILURE))) if self._store.check([_FAILURE]) else None

    def claim(self, failure: Failure) -> Failure:
        """Report a failure, unless another one was reported before, and return the first one."""
        with _or_lost():
            return Failure(**json.loads(self._store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))))


@contextmanager
def _or_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's DistNetworkError, DistStoreError and a refused connection are RuntimeErrors
        raise LostStoreError(str(error)) from error


def answers(host: str, port: int) -> bool:
    """Whether a server listens there. It opens a plain connection: each failed try of a TCPStore prints a stack and
    cannot be interrupted."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


def comes_from_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank ended. gloo raises a plain RuntimeError for that."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _PEER_WORDS)
    )


def explain(error: Exception, settings: Settings, place: str) -> Exception:
    """Return a WastedError for an error that the user can fix, and any other error unchanged."""
    if determinism.lacks_a_kernel(error):
        return SettingsError(
            f"run.deterministic is set, and torch {torch.__version__} refuses an operation while {place}: "
            f"{_first_line(error)}",
            "two runs would not end with the same bits",
            "set run.deterministic to false, change the setting that uses this operation, or try another version of "
            "torch",
        )
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return SettingsError(
            f"BatchNorm got one value per channel: {_first_line(error)}",
            f"a micro-batch of one image of {settings.data.image_size} px is one pixel in the last stage, which has no "
            "variance",
            "raise train.batch_size or train.max_micro_batch so that a micro-batch has two images, raise "
            "data.image_size, or freeze the network (model.freeze: backbone)",
        )
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        return storage_error(error, f"the training, while {place}", settings.run.out)
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    evaluates = place == "evaluating"
    key = "evaluate.batch_size" if evaluates else "train.max_micro_batch"
    images = settings.evaluate.batch_size if evaluates else settings.train.max_micro_batch
    if not images:
        return DeviceMemoryError(
            f"out of GPU memory while {place} with the micro-batch that was chosen when this run started: "
            f"{_first_line(error)}",
            "another program uses memory that was free then, or this GPU has less memory",
            "stop other programs on the GPU (see nvidia-smi), or set train.max_micro_batch to less than the size in "
            "log.txt, which changes the BatchNorm groups",
        )
    size_px = settings.data.eval_size_px if evaluates else settings.data.image_size
    size_key = "data.eval_size" if evaluates and settings.data.eval_size else "data.image_size"
    same = "" if evaluates else " (the global batch stays the same: accumulation follows)"
    return DeviceMemoryError(
        f"out of GPU memory while {place} with {key} {images} at {size_px} px: {_first_line(error)}",
        f"one device has too little memory for {images} images in a pass of {settings.model.arch}",
        f"set {key} to {max(1, images // 2)} or less{same}, or stop other programs on the GPU (see nvidia-smi)"
        if images > 1
        else f"lower {size_key}, use a smaller model.arch, or stop other programs on the GPU (see nvidia-smi)",
    )


def failure_message(error: Exception, where: str) -> str:
    """Return the message of a failed rank. `where` is its position, or '' for a single process."""
    if isinstance(error, WastedError):
        notes = getattr(error, "__notes__", ())
        # a note "rank ..." is the position of another rank that raised the error; other notes name a thread
        rank = next((note for note in notes if note.startswith("rank ")), where)
        threads = [note for note in notes if not note.startswith("rank ")]
        return f"{error}\n  at: {', '.join([rank, *threads])}" if where else str(error)
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    return (
        f"{where or 'the training'}: {type(error).__name__}: {_first_line(error)}{notes}\n"
        "  so: every process of this run stops; the checkpoints are intact\n"
        "  do: run the same command again to resume from the newest checkpoint; if it fails again, see the traceback "
        "below"
    )


def describe_blocking_ranks(
    before: Sequence[Beat | None], after: Sequence[Beat | None], *, only_silent: bool = False
) -> str:
    """Return a message about the ranks that the others wait for, from the beats of all ranks at two times.

    These are the silent ranks, which were killed or stopped, or whose machine is down; without a silent rank, those
    whose loops have made the least progress. Returns '' if the beats do not show any.
    """
    pairs = list(zip(before, after, strict=False))
    silent = [rank for rank, (then, now) in enumerate(pairs) if then == now and not (now and now.left)]
    if silent:
        who = f"{_ranks(silent)} of {len(after)} {'does' if len(silent) == 1 else 'do'} not respond any more"
        remedy = (
            "check whether it was killed (out of memory: see `dmesg` and the launcher's message) or stopped, or its "
            "machine is down; run the same command again to resume from the newest checkpoint"
        )
        blocking = silent
    else:
        if only_silent or len(after) < 2:
            return ""
        fewest = min(beat.marks for beat in after if beat)
        blocking = [rank for rank, beat in enumerate(after) if beat and beat.marks == fewest]
        if len(blocking) == len(after):
            who = f"all {len(after)} ranks hang at the same place"
        else:
            who = f"the others wait for {_ranks(blocking)} of {len(after)}"
        remedy = (
            "see each rank's stack traces in the failures folder of the run; run the same command again to resume from "
            "the newest checkpoint; if the run was only slow, raise run.timeout_s"
        )
    named = [f"  rank {rank}: {_place(after[rank])}" for rank in blocking[:_MOST_NAMED]]
    others = [rank for rank in range(len(after)) if rank not in blocking][: _MOST_NAMED // 2]
    named += [f"  rank {rank}: {_place(after[rank])}" for rank in others]
    return "\n".join([who, *named, "  so: all ranks of this run stop; the checkpoints are intact", f"  do: {remedy}"])


def describe_standstill(rank: int, beat: Beat) -> str:
    """Return the message of a hung rank that cannot compare itself with other ranks."""
    return (
        f"no progress: rank {rank}: {_place(beat)}\n"
        "  so: this run stops; the checkpoints are intact\n"
        "  do: see the stack traces of its threads in the failures folder of the run, and check the disk that it "
        "reads; then run the same command again; if the run was only slow, raise run.timeout_s"
    )


def describe_lost_launcher(where: str, signal_name: str) -> str:
    """Return the message of a rank whose launcher ended before the ranks had joined."""
    return (
        f"nobody answers at {where}, where the launcher or rank 0 lets the processes join"
        + (f", and the process received {signal_name}" if signal_name else "")
        + "\n  so: this process ends before the run has started; the checkpoints are unchanged\n"
        "  do: run the same command again to resume from the newest checkpoint, or to start"
    )


def _place(beat: Beat | None) -> str:
    if beat is None:
        return "never connected"
    detail = f" ({beat.detail})" if beat.detail and beat.place in ("waiting for data", "evaluating") else ""
    return f"step {beat.step}, {beat.place} for {beat.quiet_s:.0f} s{detail}"


def _ranks(ranks: Sequence[int]) -> str:
    names = ", ".join(str(rank) for rank in ranks[:_MOST_NAMED])
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"rank {names}{more}" if len(ranks) == 1 else f"ranks {names}{more}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:400]
