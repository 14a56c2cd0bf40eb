"""What a failure is called: errors of the device and of the other ranks, and which rank the others wait for. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from wasteddp.errors import DeviceMemoryError, SettingsError, WastedError
from wasteddp.settings import Settings
from wasteddp.training.distributed import determinism
from wasteddp.training.watchdog.heartbeat import Beat

_MOST_NAMED = 8
_PEER_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


def comes_from_a_peer(error: Exception) -> bool:
    """Whether a collective broke because another rank ended: gloo says it with a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _PEER_WORDS)
    )


def explained(error: Exception, settings: Settings, place: str) -> Exception:
    """The error as something that the user can fix, where it is one."""
    if determinism.lacks_a_kernel(error):
        return SettingsError(
            f"run.deterministic is set, and torch {torch.__version__} refuses an operation while {place}: "
            f"{_first_line(error)}",
            "two runs would not end with the same bits",
            "set run.deterministic to false, or leave out the setting that asks for this operation; what a new version "
            "of torch brought may be gone in another",
        )
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    evaluates = place == "evaluating"
    key = "evaluate.batch_size" if evaluates else "train.max_micro_batch"
    images = settings.evaluate.batch_size if evaluates else settings.train.max_micro_batch
    if not images:
        return DeviceMemoryError(
            f"out of GPU memory while {place} with the micro-batch of this run, which fitted when it began: "
            f"{_first_line(error)}",
            "something else takes the memory that was free then, or this GPU has less",
            "close what else uses the GPU (nvidia-smi shows it), or set train.max_micro_batch to less than log.txt "
            "names; BatchNorm's groups are others then",
        )
    size_px = settings.data.eval_size_px if evaluates else settings.data.image_size
    size_key = "data.eval_size" if evaluates and settings.data.eval_size else "data.image_size"
    same = "" if evaluates else "; the global batch, and so the result, stay the same: accumulation follows"
    return DeviceMemoryError(
        f"out of GPU memory while {place} with {key} {images} at {size_px} px: {_first_line(error)}",
        f"one device cannot take {images} images through {settings.model.arch} at once",
        f"set {key} to {max(1, images // 2)} or less{same}; or close what else uses the GPU (nvidia-smi shows it)"
        if images > 1
        else f"lower {size_key}, or take a smaller model.arch; or close what else uses the GPU",
    )


def told(error: Exception, where: str) -> str:
    """The message of a failed rank; `where` names it, if there are others."""
    if isinstance(error, WastedError):
        notes = getattr(error, "__notes__", ())
        # a note says on which rank it was raised, if that was another one; others say in which thread
        rank = next((note for note in notes if note.startswith("rank ")), where)
        threads = [note for note in notes if not note.startswith("rank ")]
        return f"{error}\n  at: {', '.join([rank, *threads])}" if where else str(error)
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    return (
        f"{where or 'the training'}: {type(error).__name__}: {_first_line(error)}{notes}\n"
        "  so: every process of this run stops; checkpoints are whole\n"
        "  do: the same command goes on from the newest checkpoint; if it fails again, the traceback below says where"
    )


def accusation(before: Sequence[Beat | None], after: Sequence[Beat | None], *, only_silent: bool = False) -> str:
    """Which ranks the others wait for, from all ranks' beats some time apart; '' if they do not show it.

    Silent ranks first: killed, stopped, or on a machine that is gone. Else those whose loops have come least far.
    """
    pairs = list(zip(before, after, strict=False))
    silent = [rank for rank, (then, now) in enumerate(pairs) if then == now and not (now and now.left)]
    if silent:
        who = f"{_ranks(silent)} of {len(after)} {'gives' if len(silent) == 1 else 'give'} no sign of life any more"
        remedy = (
            "was it killed (out of memory: `dmesg`, the launcher's message), stopped, or is its machine gone? "
            "The same command goes on from the newest checkpoint"
        )
        guilty = silent
    else:
        if only_silent or len(after) < 2:
            return ""
        fewest = min(beat.marks for beat in after if beat)
        guilty = [rank for rank, beat in enumerate(after) if beat and beat.marks == fewest]
        if len(guilty) == len(after):
            who = f"all {len(after)} ranks stand still at the same place"
        else:
            who = f"the others wait for {_ranks(guilty)} of {len(after)}"
        remedy = (
            "the failures folder of the run holds each rank's stack; the same command goes on from the newest "
            "checkpoint; if this was only slow, raise run.timeout_s"
        )
    named = [f"  rank {rank}: {_place(after[rank])}" for rank in guilty[:_MOST_NAMED]]
    others = [rank for rank in range(len(after)) if rank not in guilty][: _MOST_NAMED // 2]
    named += [f"  rank {rank}: {_place(after[rank])}" for rank in others]
    return "\n".join([who, *named, "  so: this run stops everywhere; checkpoints are whole", f"  do: {remedy}"])


def standstill(rank: int, beat: Beat) -> str:
    """A rank that has nobody to compare itself with."""
    return (
        f"no progress: rank {rank}: {_place(beat)}\n"
        "  so: this run stops; checkpoints are whole\n"
        "  do: the failures folder of the run holds the stacks of its threads; look after the disk that it reads, then "
        "give the same command again; if this was only slow, raise run.timeout_s"
    )


def nobody_to_join(where: str, signal_name: str) -> str:
    """A rank whose launcher ended before the ranks had found each other."""
    return (
        f"nobody answers at {where}, where the launcher or rank 0 brings the processes together"
        + (f", and {signal_name} has asked to stop" if signal_name else "")
        + "\n  so: this process leaves before it has begun; checkpoints are as they were\n"
        "  do: the same command goes on from the newest checkpoint, or begins"
    )


def _place(beat: Beat | None) -> str:
    if beat is None:
        return "never came"
    detail = f" ({beat.detail})" if beat.detail and beat.place in ("waiting for data", "evaluating") else ""
    return f"step {beat.step}, {beat.place} for {beat.quiet_s:.0f} s{detail}"


def _ranks(ranks: Sequence[int]) -> str:
    names = ", ".join(str(rank) for rank in ranks[:_MOST_NAMED])
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"rank {names}{more}" if len(ranks) == 1 else f"ranks {names}{more}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:400]
