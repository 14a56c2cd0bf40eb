"""Measures losses and times between two rows of metrics. Losses stay on the device until a row is due."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from wasteddp.training.distributed.runtime import Runtime

Item = TypeVar("Item")

_MOST_RANKS = 16  # up to which each rank has its own metrics: each name is another curve on a dashboard


@dataclass(frozen=True, slots=True)
class _Share:
    """One rank's measurements since the last row."""

    images_per_s: float
    wait_fraction: float
    starved_fraction: float
    p50_ms: float
    p95_ms: float
    peak_mb: float


class Meter:
    """Accumulates losses and times from one `read` to the next. `device` holds the losses."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), device=device)
        self.step_loss = torch.zeros((), device=device)  # this rank's part of the current step's mean loss
        self._skipped = torch.zeros((), device=device)
        self._steps, self._waited_s, self._since = 0, 0.0, time.perf_counter()
        self._forward_s, self._forward_cpu_s = 0.0, 0.0
        self._step_s: list[float] = []
        self._step_began = self._since

    def waiting(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Yield the same batches and measure the time spent waiting for them."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self._waited_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Measure a forward pass, in which the loop's thread works alone and waits for nothing.

        On a GPU another thread launches the backward pass, and the rest of a step may wait for other ranks.
        """
        began_s, cpu_began_s = time.perf_counter(), time.thread_time()
        yield
        self._forward_cpu_s += time.thread_time() - cpu_began_s
        self._forward_s += time.perf_counter() - began_s

    def add(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's part of this rank's mean loss."""
        self.step_loss += loss.detach()

    @property
    def num_steps(self) -> int:
        """Number of steps since the last row."""
        return self._steps

    def step_done(self, skipped: torch.Tensor | None = None) -> None:
        """Count a step. The loss of a step is left out if `skipped`, bool [], is true.

        On a GPU the step has only been launched by now: the times of single steps are exact only in their sum.
        """
        if skipped is None:
            self._loss += self.step_loss
        else:
            self._loss += torch.where(skipped, 0.0, self.step_loss)
            self._skipped += skipped
        self.step_loss.zero_()
        self._steps += 1
        now = time.perf_counter()
        self._step_s.append(now - self._step_began)
        self._step_began = now

    def read(self, runtime: Runtime, global_batch: int) -> dict[str, float]:
        """Return the "train/..." metrics since the last row, and restart; without a loss if all steps were skipped.
        All ranks."""
        steps = max(self._steps, 1)
        loss, skipped = float(runtime.sum(self._loss)), int(self._skipped)  # all ranks; waits for the device
        seconds = max(time.perf_counter() - self._since, 1e-9)
        shares = runtime.gather(self._share(runtime, steps * global_batch / runtime.world_size, seconds))  # all ranks
        self.restart()
        kept = {"train/loss": loss / ((steps - skipped) * runtime.world_size)} if skipped < steps else {}
        return kept | {
            "train/skipped": skipped,
            "train/step_ms": 1000 * seconds / steps,
            "train/step_ms_p50": float(np.median([share.p50_ms for share in shares])),
            "train/step_ms_p95": max(share.p95_ms for share in shares),
            "train/images_per_s": global_batch * steps / seconds,
            "train/wait_fraction": float(np.mean([share.wait_fraction for share in shares])),
            "train/wait_fraction_max": max(share.wait_fraction for share in shares),
            "train/starved_fraction": max(share.starved_fraction for share in shares),
            "memory/peak_mb": max(share.peak_mb for share in shares),
            **(_by_rank(shares) if 1 < len(shares) <= _MOST_RANKS else {}),
        }

    def restart(self) -> None:
        """Discard the measurements since the last row, for example after an evaluation."""
        self._loss, self._skipped = torch.zeros_like(self._loss), torch.zeros_like(self._skipped)
        self._steps, self._waited_s, self._since = 0, 0.0, time.perf_counter()
        self._forward_s, self._forward_cpu_s = 0.0, 0.0
        self._step_s, self._step_began = [], self._since

    def _share(self, runtime: Runtime, num_images: float, seconds: float) -> _Share:
        p50_s, p95_s = np.percentile(self._step_s or [0.0], (50, 95))
        busy_s = max(seconds - self._waited_s, 1e-9)
        return _Share(
            images_per_s=num_images / busy_s,
            wait_fraction=self._waited_s / seconds,
            starved_fraction=starved_fraction(self._forward_s, self._forward_cpu_s),
            p50_ms=1000 * p50_s,
            p95_ms=1000 * p95_s,
            peak_mb=_peak_mb(runtime.device),
        )


def starved_fraction(wall_s: float, cpu_s: float) -> float:
    """Return the fraction of `wall_s` in which a thread that waits for nothing did not run, given its CPU time."""
    return max(0.0, 1 - cpu_s / wall_s) if wall_s > 0 else 0.0


def _by_rank(shares: list[_Share]) -> dict[str, float]:
    row = {f"rank/{rank}/images_per_s": share.images_per_s for rank, share in enumerate(shares)}
    return row | {f"rank/{rank}/wait_fraction": share.wait_fraction for rank, share in enumerate(shares)}


def _peak_mb(device: torch.device) -> float:
    """Return the peak memory of this process in MB: of the GPU's allocator, or the resident set without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes on macOS, KiB on Linux
