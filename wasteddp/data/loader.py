"""Plan + reader -> batches of uint8 images, decoded ahead by threads.

Legend: B images of one rank's batch, C = 3, S the side.

Threads are for a network that trains on the CPU. libjpeg-turbo, torch's resize and hashlib release the GIL, so threads
decode in parallel; they start quickly, share the memory of the process and end with it. With a GPU they would take the
GIL from the thread that launches kernels, so `process_loader` is used there.

If the network trains on the same cores, the threads run only when it leaves a core idle (Linux's idle class). Otherwise
a decoding thread could displace one of OpenMP's threads, and the other OpenMP threads would wait for it at the end of
every layer; this costs 5 % of a ResNet50's speed on two cores. Idle threads cannot block training: the thread that
needs a batch decodes what they have not started.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch

from wasteddp.data.batch import MAX_REPLACEMENTS, Batch, Damage, refuse_damaged
from wasteddp.data.decoding.crop import Draws, EvaluationView, TrainingView, View
from wasteddp.data.decoding.decode import Encoded, ImageHWC, UndecodableError
from wasteddp.data.decoding.workers import DecodeServer
from wasteddp.data.process_loader import ProcessLoader
from wasteddp.data.reader import SplitReader
from wasteddp.errors import DamagedSampleError, print_warning
from wasteddp.order.keyed_random import I64
from wasteddp.order.plan import PADDING, EvaluationPlan, TrainPlan

_PLANNED_SAMPLES = 1 << 12  # samples of a rank whose order is computed in one call
_TASKS_PER_WORKER = 4  # more and smaller tasks than workers, so that a batch does not wait for one slow worker

Filled = tuple[int, Encoded | None]  # the sample that was read, and what the device still has to decode


@dataclass(slots=True)
class _Pending:
    epoch: int
    step_in_epoch: int
    images: torch.Tensor  # [B, S, S, C]
    labels: torch.Tensor
    samples: I64
    read: I64  # the samples that were used
    draws: Draws
    encoded: list[Encoded | None]
    tasks: list[tuple[range, Future[list[Damage]]]]  # rows of the batch, and the task that fills them


class Loader:
    """Decodes batches ahead of their use.

    Memory: (prefetch + 1) batches of B * 3 * S^2 bytes, with the largest S, and one decoded image for each worker.

    Args:
        reader: of the split.
        view: converts the bytes of a sample to an image.
        image_size_px: S, or a function that returns S for an epoch; batches of two epochs may be pending together.
        workers: decoding threads.
        prefetch: batches decoded ahead.
        replace: whether a sample that cannot be decoded is replaced (training) or raises an error (evaluation).
        pin_memory: use page-locked memory for the batches, so that copies to a GPU overlap with its work.
        idle: decode only when a core has no other work, for training on a CPU.
    """

    def __init__(
        self,
        reader: SplitReader,
        view: View,
        *,
        image_size_px: int | Callable[[int], int],
        workers: int,
        prefetch: int = 2,
        replace: bool = False,
        pin_memory: bool = False,
        idle: bool = False,
    ) -> None:
        self._reader, self._view, self._size = reader, view, image_size_px
        self._labels = reader.labels
        self._workers, self._prefetch = workers, prefetch
        self._replace, self._pin, self._idle = replace, pin_memory, idle
        self._at_work: dict[str, tuple[int, float]] = {}  # thread -> its sample, and its start time
        self._pool = ThreadPoolExecutor(workers, "decode")
        _start_threads(self._pool, workers, idle=idle)

    def batches(self, steps: Iterable[tuple[int, int, I64]]) -> Iterator[Batch]:
        """Yield a batch for each (epoch, step in epoch, sample numbers), in order."""
        pending: deque[_Pending] = deque()
        steps = self._reader.ahead(steps, in_flight=self._prefetch + 1)
        try:
            while True:
                while len(pending) <= self._prefetch and (step := next(steps, None)):
                    pending.append(self._start(*step))
                if not pending:
                    return
                yield self._finish(pending.popleft())
        finally:
            for batch in pending:
                for _, task in batch.tasks:
                    task.cancel()

    def at_work(self) -> str:
        """Describe the sample that a thread has been decoding for the longest time; '' if all threads are idle.

        May be called from any thread.
        """
        longest = min(self._at_work.copy().items(), key=lambda item: item[1][1], default=None)
        if longest is None:
            return ""
        name, (sample, since) = longest
        return f"{name} has been at {self._reader.describe(sample)} for {time.monotonic() - since:.0f} s"

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, epoch: int, step_in_epoch: int, samples: I64) -> _Pending:
        side = self._size(epoch) if callable(self._size) else self._size
        images = torch.empty((len(samples), side, side, 3), dtype=torch.uint8, pin_memory=self._pin)
        labels = torch.zeros(len(samples), dtype=torch.int64, pin_memory=self._pin)
        read, draws = np.full(len(samples), PADDING), self._view.draws(samples, epoch)
        pending = _Pending(epoch, step_in_epoch, images, labels, samples, read, draws, [None] * len(samples), [])
        chunk = max(1, -(-len(samples) // (self._workers * _TASKS_PER_WORKER)))
        for at in range(0, len(samples), chunk):
            rows = range(at, min(at + chunk, len(samples)))
            pending.tasks.append((rows, self._pool.submit(self._fill, pending, rows)))
        return pending

    def _finish(self, pending: _Pending) -> Batch:
        damage: list[Damage] = []
        for rows, task in pending.tasks:
            # idle threads may never get a core: this thread runs the tasks that they have not started
            damage += self._fill(pending, rows) if self._idle and task.cancel() else task.result()
        return Batch(
            pending.epoch,
            pending.step_in_epoch,
            pending.images.permute(0, 3, 1, 2),  # [B, S, S, C] -> [B, C, S, S], channels-last without a copy
            pending.labels,
            pending.samples,
            pending.read,
            tuple(damage),
            tuple(pending.encoded) if any(pending.encoded) else (),
        )

    def _fill(self, pending: _Pending, rows: range) -> list[Damage]:
        # numpy views: torch's copy would start an OpenMP team in this thread for every image
        images, labels = pending.images.numpy(), pending.labels.numpy()
        damage: list[Damage] = []
        for row in rows:
            sample = int(pending.samples[row])
            if sample == PADDING:
                images[row] = 0
                continue
            stored = sample % self._reader.num_samples
            used, left = self._fill_row(images[row], stored, pending.draws[row], pending.epoch, damage)
            labels[row], pending.encoded[row] = self._labels[used], left
            pending.read[row] = used
        return damage

    def _fill_row(self, out: ImageHWC, sample: int, draws: Draws, epoch: int, damage: list[Damage]) -> Filled:
        """Call `_read_row`, and record what the thread is doing for the messages about a hang or an error."""
        name = threading.current_thread().name
        self._at_work[name] = sample, time.monotonic()
        try:
            return self._read_row(out, sample, draws, epoch, damage)
        except Exception as error:
            error.add_note(f"in the loader's thread {name}, at {self._reader.describe(sample)}")
            raise
        finally:
            del self._at_work[name]

    def _read_row(self, out: ImageHWC, sample: int, draws: Draws, epoch: int, damage: list[Damage]) -> Filled:
        """Write the view of `sample`, or of the next sample that can be read."""
        try:
            return sample, self._view.fill(out, self._reader.read(sample), draws)
        except (UndecodableError, DamagedSampleError) as error:
            replacement, left = self._replace_sample(out, sample, epoch, error)
            damage.append(replacement)
            return replacement.replaced_by, left

    def _replace_sample(
        self, out: ImageHWC, sample: int, epoch: int, error: Exception
    ) -> tuple[Damage, Encoded | None]:
        """Write the view of the next sample that can be read, in place of `sample`, which cannot."""
        where = self._reader.describe(sample)
        reason = error.found.removeprefix(f"{where}: ") if isinstance(error, DamagedSampleError) else str(error)
        for after in range(1, MAX_REPLACEMENTS if self._replace else 0):
            used = (sample + after) % self._reader.num_samples
            with contextlib.suppress(UndecodableError, DamagedSampleError):
                draws = self._view.draws(np.array([used]), epoch)[0]
                left = self._view.fill(out, self._reader.read(used), draws)
                return Damage(sample, where, reason, used), left
        raise refuse_damaged(self._reader.describe_with_source(sample), reason, is_replaced=self._replace) from error


AnyLoader = Loader | ProcessLoader


def training_loader(
    reader: SplitReader,
    *,
    seed: int,
    image_size_px: int | Callable[[int], int],
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    workers: int,
    prefetch: int,
    pin_memory: bool,
    idle: bool = False,
    on_device: bool = False,
    processes: bool = False,
    largest_px: int = 0,
    server: DecodeServer | None = None,
    warn: Callable[[str], None] = print_warning,
) -> AnyLoader:
    """Return a loader of random crops, which replaces samples that cannot be decoded.

    Args not listed here are those of `Loader` and `TrainingView`.

    Args:
        on_device: leave plain JPEGs to be decoded on the device.
        processes: decode in processes, as is best with a GPU, instead of threads. The batches are the same.
        largest_px: the largest side that will be needed.
        server: forks the processes; if left out, the loader starts its own.
        warn: called with a message for each process that died.
    """
    return _loader(
        reader,
        TrainingView(seed, crop_scale, crop_ratio, on_device),
        processes=processes,
        largest_px=largest_px,
        server=server,
        warn=warn,
        image_size_px=image_size_px,
        workers=workers,
        prefetch=prefetch,
        replace=True,
        pin_memory=pin_memory,
        idle=idle,
    )


def evaluation_loader(
    reader: SplitReader,
    *,
    image_size_px: int,
    resize_px: int,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
    processes: bool = False,
    server: DecodeServer | None = None,
    warn: Callable[[str], None] = print_warning,
) -> AnyLoader:
    """Return a loader of the centre views that evaluation and prediction use."""
    return _loader(
        reader,
        EvaluationView(resize_px),
        processes=processes,
        server=server,
        warn=warn,
        image_size_px=image_size_px,
        workers=workers,
        prefetch=prefetch,
        pin_memory=pin_memory,
    )


def _loader(
    reader: SplitReader,
    view: View,
    *,
    processes: bool,
    server: DecodeServer | None,
    warn: Callable[[str], None],
    largest_px: int = 0,
    **how: Any,
) -> AnyLoader:
    if processes:
        return ProcessLoader(reader, view, largest_px=largest_px, server=server, warn=warn, **how)
    return Loader(reader, view, **how)


def _start_threads(pool: ThreadPoolExecutor, workers: int, *, idle: bool) -> None:
    """Start the threads with OpenMP teams of one thread.

    Otherwise torch's resize starts a team in each of them, whose threads wait actively for the next image. Without
    these teams, two decoding threads on two cores are 10 to 25 % faster.
    """
    threads = torch.get_num_threads()
    all_started = threading.Barrier(workers + 1)

    def start() -> None:
        if idle and hasattr(os, "SCHED_IDLE"):  # Linux; elsewhere the threads compete
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
        torch.set_num_threads(1)  # for this thread, and for every thread whose first query comes later
        torch.get_num_threads()  # the first query of this thread
        all_started.wait()  # so that each thread runs `start` once

    for _ in range(workers):
        pool.submit(start)
    all_started.wait()
    torch.set_num_threads(threads)


def training_steps(
    plan: TrainPlan, first: int, last: int, *, rank: int, world_size: int
) -> Iterator[tuple[int, int, I64]]:
    """Yield (epoch, step in epoch, samples of the rank) for the optimizer steps `first` .. `last` - 1 of a run."""
    at_once = max(1, _PLANNED_SAMPLES * world_size // plan.global_batch)  # planning one step costs nearly as much
    step = first
    while step < last:
        epoch, begin = divmod(step, plan.steps_per_epoch)
        steps = range(begin, min(begin + at_once, begin + last - step, plan.steps_per_epoch))
        planned = plan.steps_samples(epoch, steps, rank=rank, world_size=world_size)
        yield from ((epoch, step_in_epoch, samples) for step_in_epoch, samples in zip(steps, planned, strict=True))
        step += len(steps)


def evaluation_steps(plan: EvaluationPlan, *, rank: int, world_size: int) -> Iterator[tuple[int, int, I64]]:
    """Yield (0, number, samples of the rank) for each batch of an evaluation."""
    for number in range(plan.num_batches(world_size)):
        yield 0, number, plan.batch_samples(number, rank=rank, world_size=world_size)
