"""`profile.steps`: a trace of some steps, and in words what they waited for.

Each moment of the steps is counted once, by what comes first of: the device computed; ranks talked; the loop waited for
a batch; nothing of these, which is Python. Talk and reading that hide behind computing cost nothing and count as it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from wasteddp.data.manifest import write_atomically
from wasteddp.errors import storage
from wasteddp.settings import Profile
from wasteddp.training.runtime import Runtime

Item = TypeVar("Item")
Span = tuple[float, float]  # begin and end, us
Shares = dict[str, float]  # of the steps' time; they add up to 1

KINDS = ("device", "communication", "data", "Python")
_STEP, _WAIT = "wasteddp: step", "wasteddp: waiting for data"
_TALK = ("gloo:", "nccl:", "c10d::", "ncclDevKernel", "ncclKernel", "mpi:", "ucc:")

_REMEDIES = {
    "data": "let more threads decode (data.workers), read ahead further (data.prefetch), keep the shards on a local "
    "disk, or shrink the images once (wasteddp shard --max-side)",
    "device": "this is as it should be; faster are a lower precision, smaller images, a smaller network, more devices",
    "communication": "give each rank more to do between two messages (a larger train.batch_size), use fewer ranks, or "
    "a faster network; where one rank is slower than the others, that one is what they wait for",
    "Python": "give each call more to do: a larger train.max_micro_batch, or larger images; see the gaps in the trace",
}


class Say(Protocol):
    def __call__(self, message: str) -> None: ...


class Profiler:
    """Watches the steps `profile.skip` .. `profile.skip + profile.steps` of this start. Made and called on all ranks.

    Args:
        folder: for `trace.json.gz` and `verdict.txt`, of rank 0.
    """

    def __init__(self, asked: Profile, world: Runtime, folder: Path, say: Say) -> None:
        self._asked, self._world, self._folder, self._say = asked, world, folder, say
        self._seen = 0
        self._profile: Any = None
        self._step: Any = None

    def watched(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The same batches; where nothing is to be profiled, the very same iterator."""
        return self._watched(batches) if self._asked.steps else batches

    def step_done(self) -> None:
        """All ranks: behind the optimizer's step, before anything is measured, evaluated or saved."""
        self._seen += 1
        if self._step:
            self._step.__exit__(None, None, None)
            self._step = None
            if self._seen == self._asked.skip + self._asked.steps:
                self._finish()

    def _watched(self, batches: Iterator[Item]) -> Iterator[Item]:
        try:
            while True:
                if self._seen == self._asked.skip:
                    self._profile = self._started()
                if self._profile:
                    self._step = record_function(_STEP)
                    self._step.__enter__()
                with record_function(_WAIT):
                    batch = next(batches, None)
                if batch is None:
                    if self._seen < self._asked.skip + self._asked.steps:
                        self._say(
                            f"profile: none, this start ended behind its step {self._seen}; profile.skip and "
                            f"profile.steps ask for {self._asked.skip + self._asked.steps}"
                        )
                    return
                yield batch
        finally:
            if self._profile:
                self._profile.stop()

    def _started(self) -> Any:
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write its own steps over a terminal's display
        started = profile(activities=activities)
        started.start()
        return started

    def _finish(self) -> None:
        """All ranks: stops, compares the ranks, and lets rank 0 write."""
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)  # the last step's kernels belong to it
        stopped, self._profile = self._profile, None
        stopped.stop()
        shares, seconds = shares_of(stopped.events())
        by_rank = self._world.gather(shares)  # all ranks
        text = verdict(by_rank, step_ms=1000 * seconds / self._asked.steps, steps=self._asked.steps)
        with self._world.together():
            if self._world.is_main:
                with storage("writing the profile", self._folder):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    stopped.export_chrome_trace(str(self._folder / "trace.json.gz"))
                write_atomically(self._folder / "verdict.txt", text.encode())
        self._say(f"profile: {text}trace of rank 0: {self._folder}/trace.json.gz, opens in https://ui.perfetto.dev")


def shares_of(events: Sequence[Any]) -> tuple[Shares, float]:
    """What the steps' time went to, and the seconds of it, from the events of torch's profiler."""
    spans: dict[str, list[Span]] = {kind: [] for kind in (*KINDS, "steps")}
    has_kernels = any(event.device_type.name != "CPU" for event in events)
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        on_host = event.device_type.name == "CPU"
        if event.name in (_STEP, _WAIT):
            if on_host:  # a GPU's timeline repeats the annotation
                spans["steps" if event.name == _STEP else "data"].append(span)
        elif event.name.startswith(_TALK):
            if not (on_host and has_kernels):  # with a GPU the host only hands the message over
                spans["communication"].append(span)
        elif not on_host or (event.name.startswith("aten::") and not has_kernels):
            spans["device"].append(span)
    return exclusive_shares(spans), sum(end - begin for begin, end in spans["steps"]) / 1e6


def exclusive_shares(spans: Mapping[str, Sequence[Span]]) -> Shares:
    """Spans of "steps" and of each kind, which may overlap -> parts of the steps' time that add up to 1."""
    edges = np.unique([edge for kind in spans.values() for span in kind for edge in span])
    if len(edges) < 2:
        return {kind: float(kind == "Python") for kind in KINDS}
    lengths = np.diff(edges)  # of the pieces between two neighbouring edges

    def covered(kind: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which pieces lie in a span of this kind."""
        opened = np.zeros(len(edges), np.int64)
        np.add.at(opened, np.searchsorted(edges, [begin for begin, _ in spans[kind]]), 1)
        np.add.at(opened, np.searchsorted(edges, [end for _, end in spans[kind]]), -1)
        return np.asarray(opened.cumsum()[:-1] > 0)

    left = covered("steps")
    total = float(lengths[left].sum())
    shares: Shares = {}
    for kind in KINDS[:-1]:
        here = left & covered(kind)
        shares[kind] = float(lengths[here].sum()) / total if total else 0.0
        left &= ~here
    return {**shares, "Python": float(lengths[left].sum()) / total if total else 1.0}


def verdict(by_rank: Sequence[Shares], *, step_ms: float, steps: int) -> str:
    """The bound in words, the shares that led to it, and what to do.

    The rank that waits least for the others sets the pace of all: its largest share is the bound.
    """
    pace = min(range(len(by_rank)), key=lambda rank: by_rank[rank]["communication"])
    bound = max(KINDS, key=lambda kind: by_rank[pace][kind])
    lines = [f"bound by {bound}: {by_rank[pace][bound]:.0%} of {steps} steps of {step_ms:.3g} ms"]
    for rank, shares in enumerate(by_rank):
        lines.append(f"  rank {rank}: " + ", ".join(f"{kind} {shares[kind]:.1%}" for kind in KINDS))
    lines.append(f"  do: {_REMEDIES[bound]}")
    return "\n".join(lines) + "\n"
