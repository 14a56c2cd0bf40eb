"""One rank's part of a step, as the loader passes it to the training loop.

Legend: B images of the batch, C = 3, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from wasteddp.data.decoding.decode import Encoded
from wasteddp.errors import DamagedSampleError, WastedError
from wasteddp.order.keyed_random import I64

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
