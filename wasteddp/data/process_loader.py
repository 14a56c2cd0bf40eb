"""Plan + reader -> batches of uint8 images, decoded ahead by processes.

Legend: B images of one rank's batch, C = 3, S the side.

Processes are for training on a GPU. Decoding threads hold the GIL, which the thread that launches kernels needs, and
reduce its speed to a third (docs/streaming.md). The batches are those of `loader`, bit for bit. They are stored in
slots of one shared mapping, which workers write to and the GPU copies from. A slot is reused after the last tensor that
refers to it is deleted.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch

from wasteddp.data.batch import MAX_REPLACEMENTS, Batch, Damage, refuse_damaged
from wasteddp.data.decoding.crop import View
from wasteddp.data.decoding.decode import Encoded
from wasteddp.data.decoding.pool import DecodePool, Task, most_shards
from wasteddp.data.decoding.worker import ROW_DTYPE, UNREAD, Failure, Rows, SharedMemory
from wasteddp.data.decoding.workers import DecodeServer
from wasteddp.data.reader import SplitReader
from wasteddp.errors import DamagedSampleError, print_warning
from wasteddp.order.keyed_random import I64
from wasteddp.order.plan import PADDING

_HANDED_OUT = 2  # slots that the user of the batches may hold; further batches are copied
_ALIGNED = 4096  # bytes; a batch begins on a page


@dataclass(slots=True)
class _Pending:
    epoch: int
    step_in_epoch: int
    samples: I64
    slot: _Slot
    images: npt.NDArray[np.uint8]  # [B, S, S, C], in the slot
    rows: Rows  # [B] in the slot
    tasks: list[Task]
    shards: frozenset[int]
    sent: Future[None] | None = None  # set if sending may wait for a store


@dataclass(slots=True, frozen=True)
class _Slot:
    memory: int  # its key in the pool
    shared: SharedMemory
    offset: int
    num_bytes: int  # of images; the rows' records follow them

    def rows(self, size: int) -> Rows:
        return self.shared.view(self.offset + self.num_bytes, size * ROW_DTYPE.itemsize).view(ROW_DTYPE)


@dataclass(slots=True)
class _Slots:
    """The slots of one mapping, used until a larger batch is needed."""

    key: int
    shared: SharedMemory
    rows: int
    image_bytes: int
    free: deque[_Slot] = field(default_factory=deque)
    num_out: int = 0


class ProcessLoader:
    """Decodes batches ahead of their use, in processes; yields the same batches as `loader.Loader`.

    Memory: (prefetch + 3) batches of B * 3 * S^2 bytes in one mapping, with the largest S so far, and one decoded image
    for each worker.

    Args:
        reader, view, image_size_px, prefetch, replace: as in `loader.Loader`.
        workers: decoding processes.
        pin_memory: register the mapping with CUDA, so that copies to the GPU overlap with its work.
        idle: decode only when a core has no other work, for training on a CPU.
        largest_px: the largest S that will be needed, so that memory is reserved once.
        warn: called with a message for each process that died and was replaced.
        server: see `DecodePool`.
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
        largest_px: int = 0,
        warn: Callable[[str], None] = print_warning,
        server: DecodeServer | None = None,
    ) -> None:
        self._reader, self._view, self._size = reader, view, image_size_px
        self._labels = reader.labels
        self._workers, self._prefetch, self._largest_px = workers, prefetch, largest_px
        self._replace, self._pin, self._warn = replace, pin_memory, warn
        self._pool = DecodePool(workers, reader.open_shard, warn=warn, is_idle=idle, server=server)
        self._sender = ThreadPoolExecutor(1, "shards") if reader.may_wait else None
        self._most_shards = most_shards()
        self._slots: _Slots | None = None
        self._shared: list[SharedMemory] = []
        self._pending: deque[_Pending] = deque()
        self._abandoned: list[_Pending] = []  # batches that were not taken

    def batches(self, steps: Iterable[tuple[int, int, I64]]) -> Iterator[Batch]:
        """Yield a batch for each (epoch, step in epoch, sample numbers), in order."""
        self._settle_abandoned()
        pending = self._pending
        steps = self._reader.ahead(steps, in_flight=self._prefetch + 1)
        try:
            while True:
                while len(pending) <= self._prefetch and (step := next(steps, None)):
                    pending.append(self._start(*step))
                    self._send(pending[-1], len(pending))
                if not pending:
                    return
                batch = self._finish(pending[0])
                pending.popleft()
                yield batch
        finally:
            self._abandoned += pending
            pending.clear()

    def at_work(self) -> str:
        """Describe the sample that a worker has been decoding for the longest time; '' if all workers are idle.

        May be called from any thread.
        """
        longest = self._pool.find_longest()
        if longest is None:
            return ""
        number, sample, seconds = longest
        return f"decoding process {number} has been at {self._reader.describe(sample)} for {seconds:.0f} s"

    def close(self) -> None:
        if self._sender:
            self._sender.shutdown(wait=True, cancel_futures=True)
        self._pool.close()
        for shared in self._shared:
            shared.close()

    def __enter__(self) -> ProcessLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- loading a batch --------------------------------------------------------------------------------------------

    def _start(self, epoch: int, step_in_epoch: int, samples: I64) -> _Pending:
        side = self._size(epoch) if callable(self._size) else self._size
        slot, size = self._slot(len(samples), side), len(samples)
        images = slot.shared.view(slot.offset, size * side * side * 3).reshape(size, side, side, 3)
        rows, used = slot.rows(size), np.flatnonzero(samples != PADDING)
        images[samples == PADDING] = 0
        self._describe(rows[: len(used)], used, samples[used] % self._reader.num_samples, samples[used], epoch)
        shards = frozenset(rows["shard"][: len(used)].tolist())
        pending = _Pending(epoch, step_in_epoch, samples, slot, images, rows, [], shards)
        chunk = max(1, -(-len(used) // self._workers))
        if len(shards) > self._most_shards:
            chunk = min(chunk, self._most_shards)  # so that no task needs more
        at = slot.offset + slot.num_bytes
        for begin in range(0, len(used), chunk):
            part = rows[begin : min(begin + chunk, len(used))]
            pending.tasks.append(
                Task(slot.memory, slot.offset, side, self._view, at + begin * ROW_DTYPE.itemsize, part)
            )
        return pending

    def _describe(self, records: Rows, rows: I64, stored: I64, samples: I64, epoch: int) -> None:
        """Write the records of some rows for a worker.

        Args:
            records: to write.
            rows: their rows in the batch.
            stored: samples to read, 0 .. N-1.
            samples: numbers that key the random choices.
            epoch: of the batch.
        """
        shards, index = self._reader.records(stored)
        draws = self._view.draws(samples, epoch)
        records["row"], records["shard"], records["sample"] = rows, shards, stored
        records["offset"], records["length"], records["sha256"] = index["offset"], index["length"], index["sha256"]
        records["draws"][:, : draws.shape[1]] = draws

    def _send(self, batch: _Pending, num_pending: int) -> None:
        # workers close remote shards that no batch needs, so that their disk space can be freed
        wanted = frozenset().union(*(other.shards for other in self._pending)) if self._sender else None

        def send() -> None:
            for number, task in enumerate(batch.tasks):
                self._pool.submit(task, number + batch.step_in_epoch, wanted=wanted)

        if self._sender:
            batch.sent = self._sender.submit(send)
        else:
            send()

    def _finish(self, pending: _Pending) -> Batch:
        if pending.sent:
            pending.sent.result()  # raises the error of a shard that could not be fetched
        self._pool.wait(pending.tasks)
        size = len(pending.samples)
        read = np.where(pending.samples == PADDING, PADDING, pending.samples % self._reader.num_samples)
        encoded: list[Encoded | None] = [None] * size
        failures: list[Failure] = []
        for task in pending.tasks:
            assert task.answer is not None
            failures += task.answer[0]
            self._keep_encoded(pending, task, encoded)
        damage = []
        for failure in sorted(failures):
            row = failure[0]
            sample = int(read[row])
            replacement, encoded[row] = self._try_again(pending, failure, sample)
            if replacement:
                damage.append(replacement)
                read[row] = replacement.replaced_by
        labels = torch.zeros(size, dtype=torch.int64, pin_memory=self._pin)
        is_image = read != PADDING
        labels.numpy()[is_image] = self._labels[read[is_image]]
        return Batch(
            pending.epoch,
            pending.step_in_epoch,
            self._hand_out(pending).permute(0, 3, 1, 2),  # [B, S, S, C] -> [B, C, S, S], channels-last without a copy
            labels,
            pending.samples,
            read,
            tuple(damage),
            tuple(encoded) if any(encoded) else (),
        )

    def _keep_encoded(self, pending: _Pending, task: Task, encoded: list[Encoded | None]) -> None:
        assert task.answer is not None
        for row, data, box in task.answer[1]:
            in_row = pending.images[row].reshape(-1)[:data].tobytes() if isinstance(data, int) else data
            encoded[row] = Encoded(in_row, box)

    def _settle_abandoned(self) -> None:
        """Wait until no worker writes to the slots of batches that were not taken."""
        for left in self._abandoned:
            if left.sent and not left.sent.cancel():
                left.sent.exception()
            self._pool.wait([task for task in left.tasks if task.is_sent])
            self._give_back(left.slot)
        self._abandoned.clear()

    # --- a row that failed ------------------------------------------------------------------------------------------

    def _try_again(self, pending: _Pending, failure: Failure, sample: int) -> tuple[Damage | None, Encoded | None]:
        """Fill a failed row again: with the same sample if it can be read now, else with the next readable sample."""
        row, kind, reason = failure
        cause: Exception | None = None
        if kind == UNREAD:
            try:
                self._reader.read(sample)  # fetches a damaged copy again, or raises the exact error
            except DamagedSampleError as error:
                cause, reason = error, error.found.removeprefix(f"{self._reader.describe(sample)}: ")
            else:
                self._pool.drop(int(self._reader.records(np.array([sample]))[0][0]))
                found, encoded = self._fill_alone(pending, row, sample, int(pending.samples[row]))
                if not found:
                    return None, encoded
                reason = "the training process can read its bytes, but a decoding process cannot"
        for after in range(1, MAX_REPLACEMENTS if self._replace else 0):
            used = (sample + after) % self._reader.num_samples
            found, encoded = self._fill_alone(pending, row, used, used)
            if not found:
                return Damage(sample, self._reader.describe(sample), reason, used), encoded
        where = self._reader.describe_with_source(sample)
        raise refuse_damaged(where, reason, is_replaced=self._replace) from cause

    def _fill_alone(
        self, pending: _Pending, row: int, stored: int, sample: int
    ) -> tuple[list[Failure], Encoded | None]:
        """Fill one row in a separate task; return its failures, and the image that is left to the device."""
        record = pending.rows[row : row + 1]
        self._describe(record, np.array([row]), np.array([stored]), np.array([sample]), pending.epoch)
        at = pending.slot.offset + pending.slot.num_bytes + row * ROW_DTYPE.itemsize
        task = Task(pending.slot.memory, pending.slot.offset, pending.images.shape[1], self._view, at, record)
        self._pool.submit(task, row, wanted=None)
        self._pool.wait([task])
        assert task.answer is not None
        encoded: list[Encoded | None] = [None] * len(pending.samples)
        self._keep_encoded(pending, task, encoded)
        return task.answer[0], encoded[row]

    # --- slots ------------------------------------------------------------------------------------------------------

    def _slot(self, rows: int, side: int) -> _Slot:
        slots = self._slots
        if slots is None or rows > slots.rows or rows * side * side * 3 > slots.image_bytes:
            slots = self._slots = self._reserve(rows, max(side, self._largest_px))
        return slots.free.popleft()

    def _reserve(self, rows: int, side: int) -> _Slots:
        """Reserve slots for the pending batches and those in use. Batches in earlier, smaller slots stay there."""
        image_bytes = _align(rows * side * side * 3)
        slot_bytes = _align(image_bytes + rows * ROW_DTYPE.itemsize)
        num_slots = self._prefetch + 1 + _HANDED_OUT
        shared, key = SharedMemory(num_slots * slot_bytes), len(self._shared)
        self._shared.append(shared)
        if self._pin and not shared.register_with_cuda():
            self._warn(
                f"{shared.num_bytes:,} bytes of batches could not be page-locked, so copies to the GPU are slower; "
                "raise `ulimit -l` or the container's limit of locked memory"
            )
        self._pool.share(key, shared)
        slots = _Slots(key, shared, rows, image_bytes)
        slots.free.extend(_Slot(key, shared, number * slot_bytes, image_bytes) for number in range(num_slots))
        return slots

    def _hand_out(self, pending: _Pending) -> torch.Tensor:
        """Return the images in their slot, or a copy if the user of the batches still holds earlier ones."""
        slots, slot = self._slots, pending.slot
        if slots is None or slot.shared is not slots.shared or slots.num_out >= _HANDED_OUT:
            copy = torch.empty(pending.images.shape, dtype=torch.uint8, pin_memory=self._pin)
            copy.numpy()[:] = pending.images
            self._give_back(slot)
            return copy
        base = slot.shared.view(slot.offset, pending.images.size)
        slots.num_out += 1
        weakref.finalize(base, _free_slot, slots, slot).atexit = False
        return torch.from_numpy(base.reshape(pending.images.shape))

    def _give_back(self, slot: _Slot) -> None:
        if self._slots and slot.shared is self._slots.shared:
            self._slots.free.append(slot)


def _free_slot(slots: _Slots, slot: _Slot) -> None:
    """Free a slot after the last tensor that refers to it was deleted."""
    slots.num_out -= 1
    slots.free.append(slot)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED) * _ALIGNED
