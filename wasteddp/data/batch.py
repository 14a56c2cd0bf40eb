"""One rank's part of a step, as the loader passes it to the training loop, and its copy to the device one step ahead.

While a step is computed, the next batch is copied (and decoded, with data.decode: gpu) on a side stream.

Legend: B images of the batch, C = 3, H W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from wasteddp.data import gpu_decoding
from wasteddp.data.decoding.decode import Encoded
from wasteddp.errors import DamagedSampleError, WastedError
from wasteddp.order.keyed_random import I64

Item = TypeVar("Item")
Started = TypeVar("Started")

MAX_REPLACEMENTS = 100


@dataclass(frozen=True, slots=True)
class Damage:
    """A training sample that could not be read and was replaced by another."""

    sample: int
    where: str
    reason: str
    replaced_by: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of a step."""

    epoch: int
    step_in_epoch: int
    images_BCHW: torch.Tensor  # uint8, channels-last in memory
    labels_B: torch.Tensor  # int64; without meaning where `samples` is PADDING
    samples: I64  # [B], numbered as in `TrainPlan`; keys of each row's random choices
    read_B: I64  # 0 .. N-1: the sample that was read for each row, which is that of `samples` or its replacement
    damage: tuple[Damage, ...]
    encoded_B: tuple[Encoded | None, ...] = ()  # images that the device still has to decode into their rows
    failure: WastedError | None = None  # why the batch could not be loaded; the other ranks must be informed

    @classmethod
    def failed(cls, error: WastedError) -> Batch:
        """Return the last batch of a rank that cannot continue; it carries the error instead of images."""
        nothing, none = torch.empty(0, dtype=torch.int64), np.empty(0, np.int64)
        return cls(-1, -1, nothing, nothing, none, none, (), failure=error)

    def split(self, size: int) -> Iterator[Batch]:
        """Yield micro-batches of `size` samples, which are views of this batch."""
        for at in range(0, len(self.samples), size):
            part = slice(at, at + size)
            yield Batch(
                self.epoch,
                self.step_in_epoch,
                self.images_BCHW[part],
                self.labels_B[part],
                self.samples[part],
                self.read_B[part],
                (),
            )


def refuse_damaged(where: str, reason: str, *, is_replaced: bool) -> DamagedSampleError:
    """Return the error for a sample that can be neither used nor replaced."""
    return DamagedSampleError(
        f"{where} cannot be used: {reason}"
        + (f"; the {MAX_REPLACEMENTS - 1} samples after it cannot be used either" if is_replaced else ""),
        "the result would not cover the whole split",
        "find all damaged samples with `wasteddp verify`, then copy the set or create it again",
    )


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the same batches with images and labels on `device`. If it is not a GPU, they are passed through unchanged.

    The host memory must be page-locked, or the copy blocks. A batch of the loader is referenced until its copy is done,
    because after that the loader's processes may overwrite its memory.

    A separate thread starts the decoding on the device: the call to nvJPEG blocks until the images are decoded (without
    the GIL), and the loop could not launch kernels in that time.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    being_copied: deque[tuple[Batch, torch.cuda.Event]] = deque()
    with ThreadPoolExecutor(1, "wasteddp-nvjpeg") as decoder:

        def copy(source: Batch) -> tuple[Batch, torch.cuda.Event]:
            started = _copied(source, device, side)
            being_copied.append((source, started[1]))
            return started

        def begin(source: Batch) -> Callable[[], tuple[Batch, torch.cuda.Event]]:
            while being_copied and being_copied[0][1].query():  # type: ignore[no-untyped-call]
                being_copied.popleft()
            if any(source.encoded_B):
                return decoder.submit(copy, source).result
            started = copy(source)
            return lambda: started

        for finish in one_ahead(batches, begin):
            batch, copied = finish()
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)  # not the whole side stream, which is already copying the next batch
            for tensor in (batch.images_BCHW, batch.labels_B):
                # allocated on the side stream: without this its memory could be reused while it is read
                tensor.record_stream(current)
            yield batch


def one_ahead(items: Iterator[Item], begin: Callable[[Item], Started]) -> Iterator[Started]:
    """Yield `begin(item)` of each item; each is called before the result of the previous item is yielded.

    An error is raised in the place of the item that failed, after all earlier items. If it were raised earlier, the
    item that is already started would be lost, and the other ranks would wait for it.
    """
    started: list[Started] = []
    failure: Exception | None = None
    try:
        for item in items:
            started.append(begin(item))
            if len(started) > 1:
                yield started.pop(0)
    except Exception as error:
        failure = error
    yield from started
    if failure:
        raise failure


def _copied(batch: Batch, device: torch.device, side: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
    """Return the copy, and the event that marks its end."""
    with torch.cuda.stream(side):
        images_BCHW = batch.images_BCHW.to(device, non_blocking=True)
        gpu_decoding.fill(images_BCHW, batch.encoded_B)
        labels_B = batch.labels_B.to(device, non_blocking=True)
        copy = replace(batch, images_BCHW=images_BCHW, labels_B=labels_B, encoded_B=())
        return copy, side.record_event()
