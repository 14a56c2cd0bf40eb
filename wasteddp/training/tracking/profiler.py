"""`profile.steps`: writes a trace of some steps, and reports what bounds their speed.

The time of the steps is divided into four shares. Each moment counts once, as the first of these that applies: the
device computes; ranks communicate; the loop waits for a batch; none of these, which is Python. Communication and
loading that overlap with computation count as computation.

The share of Python has two possible causes, which need opposite remedies. Either the loop's thread was busy launching
kernels that are too small, or it was starved: other threads of the process held the GIL, or other programs the cores. A
busy thread uses as much CPU time as wall time. So the excess of Python's share over the CPU time of the loop's thread
is starvation. On a GPU the backward pass is excluded, because a thread of torch launches it while the loop's thread
waits. The result is a lower bound: CPU time that overlaps with the device's work is subtracted too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from wasteddp.errors import storage
from wasteddp.files import write_atomically
from wasteddp.settings import Profile
from wasteddp.training.distributed.runtime import Runtime

Item = TypeVar("Item")
Span = tuple[float, float]  # begin and end, us
Shares = dict[str, float]  # of the steps' time: those of KINDS add up to 1; "starved" is a part of "Python"

KINDS = ("device", "communication", "data", "Python")
_BACKWARD = "autograd::engine::evaluate_function"  # torch's name for one operation of the backward pass
_STEP, _WAIT = "wasteddp: step", "wasteddp: waiting for data"
_TALK = ("gloo:", "nccl:", "c10d::", "ncclDevKernel", "ncclKernel", "mpi:", "ucc:")

_REMEDIES = {
    "data": "use more workers (data.workers), prefetch more batches (data.prefetch), keep the shards on a local disk, "
    "or store smaller images (wasteddp shard --max-side)",
    "device": "nothing, this is the best case; a lower precision, smaller images, a smaller network or more devices "
    "are faster",
    "communication": "compute more between two messages (a larger train.batch_size), use fewer ranks or a faster "
    "network; if one rank is slower than the others, they wait for it",
    "Python": "compute more per call: a larger train.max_micro_batch or larger images; see the gaps in the trace",
    "starvation": "leave the GIL and a core to the loop's thread: decode in processes or in fewer threads "
    "(data.workers), and use fewer workers, ranks and other programs than cores; larger micro-batches do not help",
}


class Say(Protocol):
    def __call__(self, message: str) -> None: ...


class Profiler:
    """Profiles `profile.steps` steps after the first `profile.skip` of this start. Created and called on all ranks.

    Args:
        folder: folder of `trace.json.gz` and `verdict.txt`, which rank 0 writes.
    """

    def __init__(self, asked: Profile, runtime: Runtime, folder: Path, say: Say) -> None:
        self._asked, self._runtime, self._folder, self._say = asked, runtime, folder, say
        self._seen = 0
        self._profile: Any = None
        self._step: Any = None
        self._step_cpu_s, self._cpu_s = 0.0, 0.0  # CPU time of this thread: at the start of the step, and in all steps

    def watched(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Yield the same batches and profile them; without profile.steps return the iterator itself."""
        return self._watched(batches) if self._asked.steps else batches

    def step_done(self) -> None:
        """End the step, after the optimizer's update and before metrics, evaluation and save. All ranks."""
        self._seen += 1
        if self._step:
            self._step.__exit__(None, None, None)
            self._step = None
            self._cpu_s += time.thread_time() - self._step_cpu_s
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
                    self._step_cpu_s = time.thread_time()
                with record_function(_WAIT):
                    batch = next(batches, None)
                if batch is None:
                    if self._seen < self._asked.skip + self._asked.steps:
                        self._say(
                            f"no profile: this start ended after {self._seen} steps; profile.skip and profile.steps "
                            f"need {self._asked.skip + self._asked.steps}"
                        )
                    return
                yield batch
        finally:
            if self._profile:
                self._profile.stop()

    def _started(self) -> Any:
        activities = [ProfilerActivity.CPU]
        if self._runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it prints over the progress display
        started = profile(activities=activities, acc_events=True)  # torch 2.11 warns without it
        started.start()
        return started

    def _finish(self) -> None:
        """Stop the profiler and compare the ranks; rank 0 writes the files. All ranks."""
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)  # the last step's kernels belong to it
        stopped, self._profile = self._profile, None
        stopped.stop()
        shares, seconds = shares_of(stopped.events(), self._cpu_s)
        by_rank = self._runtime.gather(shares)  # all ranks
        text = verdict(by_rank, step_ms=1000 * seconds / self._asked.steps, steps=self._asked.steps)
        with self._runtime.sharing_errors():
            if self._runtime.is_main:
                with storage("writing the profile", self._folder):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    stopped.export_chrome_trace(str(self._folder / "trace.json.gz"))
                write_atomically(self._folder / "verdict.txt", text.encode())
        self._say(f"profile: {text}trace of rank 0: {self._folder}/trace.json.gz, opens in https://ui.perfetto.dev")


def shares_of(events: Sequence[Any], cpu_s: float) -> tuple[Shares, float]:
    """Return the shares of the steps' time and its seconds, from the events of torch's profiler.

    Args:
        cpu_s: CPU time of the loop's thread in the steps.
    """
    spans: dict[str, list[Span]] = {kind: [] for kind in (*KINDS, "steps")}
    backward: list[Span] = []  # only on a GPU, where another thread launches the backward pass
    has_kernels = any(event.device_type.name != "CPU" for event in events)
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        on_host = event.device_type.name == "CPU"
        if event.name in (_STEP, _WAIT):
            if on_host:  # a GPU's timeline repeats the annotation
                spans["steps" if event.name == _STEP else "data"].append(span)
        elif event.name.startswith(_TALK):
            if not (on_host and has_kernels):  # with a GPU the host only launches the message
                spans["communication"].append(span)
        elif event.name.startswith(_BACKWARD):
            if on_host and has_kernels:
                backward.append(span)
        elif not on_host or (event.name.startswith("aten::") and not has_kernels):
            spans["device"].append(span)
    seconds = sum(end - begin for begin, end in spans["steps"]) / 1e6
    shares = exclusive_shares(spans)
    apart = exclusive_shares({**spans, "data": [*spans["data"], *backward]})["Python"]  # outside the backward pass
    return {**shares, "starved": starved_share(apart, cpu_s / seconds if seconds else 1.0)}, seconds


def starved_share(python: float, on_core: float) -> float:
    """Return a lower bound of the fraction of the steps' time in which the loop's thread had to run and did not.

    Args:
        python: fraction in which only the loop's thread could make progress.
        on_core: CPU time of that thread in the steps, as a fraction of their time.
    """
    return max(0.0, python - on_core)


def exclusive_shares(spans: Mapping[str, Sequence[Span]]) -> Shares:
    """Return the share of each kind in the steps' time, with sum 1, from spans of "steps" and kinds, which may
    overlap."""
    edges = np.unique([edge for kind in spans.values() for span in kind for edge in span])
    if len(edges) < 2:
        return {kind: float(kind == "Python") for kind in KINDS}
    lengths = np.diff(edges)  # of the pieces between two neighbouring edges

    def covered(kind: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which pieces are covered by a span of this kind."""
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
    """Return the text of verdict.txt: what bounds the speed, the shares of each rank, and what to do.

    The rank that waits least for the others determines the speed of all: its largest share is the bound.
    """
    pace = min(range(len(by_rank)), key=lambda rank: by_rank[rank]["communication"])
    kind = max(KINDS, key=lambda kind: by_rank[pace][kind])
    is_starved = kind == "Python" and by_rank[pace]["starved"] >= by_rank[pace]["Python"] / 2
    bound = "starvation" if is_starved else kind
    lines = [f"bound by {bound}: {by_rank[pace][kind]:.0%} of {steps} steps of {step_ms:.3g} ms"]
    for rank, shares in enumerate(by_rank):
        words = ", ".join(f"{kind} {shares[kind]:.1%}" for kind in KINDS)
        lines.append(f"  rank {rank}: {words} (starved of the GIL or a core: {shares['starved']:.1%} at least)")
    lines.append(f"  do: {_REMEDIES[bound]}")
    return "\n".join(lines) + "\n"
