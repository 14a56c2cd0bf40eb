"""Copies batches to the device one step ahead: while a step is computed, the next batch is copied (and decoded, with
data.decode: gpu) on a side stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch

from wasteddp.data import gpu_decoding
from wasteddp.data.batch import Batch

Item = TypeVar("Item")
Started = TypeVar("Started")


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
