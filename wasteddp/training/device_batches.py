"""Batches to the device, one ahead: the next batch is copied, and with data.decode: gpu decoded, on a stream of its own
while this one is computed."""

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
Begun = TypeVar("Begun")


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, images and labels on `device`. Where that is no GPU they are passed on as they are.

    The host's side must be page-locked, or the copy waits. A batch of the loader is kept until its copy is done: only
    then may the loader's processes write to its memory again.

    What is to be decoded on the device is begun by a thread of its own: nvJPEG's caller waits until it is done
    (without the GIL), and the loop would launch nothing meanwhile.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    being_copied: deque[tuple[Batch, torch.cuda.Event]] = deque()
    with ThreadPoolExecutor(1, "wasteddp-nvjpeg") as decoder:

        def copy(source: Batch) -> tuple[Batch, torch.cuda.Event]:
            begun = _copied(source, device, side)
            being_copied.append((source, begun[1]))
            return begun

        def begin(source: Batch) -> Callable[[], tuple[Batch, torch.cuda.Event]]:
            while being_copied and being_copied[0][1].query():  # type: ignore[no-untyped-call]
                being_copied.popleft()
            if any(source.encoded_B):
                return decoder.submit(copy, source).result
            begun = copy(source)
            return lambda: begun

        for finish in one_ahead(batches, begin):
            batch, copied = finish()
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)  # of this batch: the next one is being copied on the same stream
            for tensor in (batch.images_BCHW, batch.labels_B):
                # it was allocated on the side stream: without this its memory could be given out while it is read
                tensor.record_stream(current)
            yield batch


def one_ahead(items: Iterator[Item], begin: Callable[[Item], Begun]) -> Iterator[Begun]:
    """`begin` of each item, called while the one before it is still to be given out.

    What ends the items with an error is raised in the place of the item that failed, after all that came before it:
    raised when it is met, it would cost the one that was begun already, which the other ranks go on with.
    """
    begun: list[Begun] = []
    failure: Exception | None = None
    try:
        for item in items:
            begun.append(begin(item))
            if len(begun) > 1:
                yield begun.pop(0)
    except Exception as error:
        failure = error
    yield from begun
    if failure:
        raise failure


def _copied(batch: Batch, device: torch.device, side: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
    """The copy, and what tells when it is whole."""
    with torch.cuda.stream(side):
        images_BCHW = batch.images_BCHW.to(device, non_blocking=True)
        gpu_decoding.fill(images_BCHW, batch.encoded_B)
        labels_B = batch.labels_B.to(device, non_blocking=True)
        copy = replace(batch, images_BCHW=images_BCHW, labels_B=labels_B, encoded_B=())
        return copy, side.record_event()
