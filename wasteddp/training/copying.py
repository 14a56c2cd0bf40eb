"""Batches to the device, one ahead: the next batch is copied on a stream of its own while this one is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from wasteddp.data.loader import Batch


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, images and labels on `device`. Where that is no GPU they are passed on as they are.

    The host's side must be page-locked, or the copy waits. Its memory may go back to the loader at once: torch's
    allocator of page-locked memory keeps it until the copies that it knows of are done.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead = _copied(next(batches, None), device, side)
    while ahead is not None:
        torch.cuda.current_stream(device).wait_stream(side)
        batch = ahead
        for tensor in (batch.images_BCHW, batch.labels_B):
            # it was allocated on the side stream: without this its memory could be given out again while it is read
            tensor.record_stream(torch.cuda.current_stream(device))
        ahead = _copied(next(batches, None), device, side)
        yield batch


def _copied(batch: Batch | None, device: torch.device, side: torch.cuda.Stream) -> Batch | None:
    if batch is None:
        return None
    with torch.cuda.stream(side):
        return replace(
            batch,
            images_BCHW=batch.images_BCHW.to(device, non_blocking=True),
            labels_B=batch.labels_B.to(device, non_blocking=True),
        )
