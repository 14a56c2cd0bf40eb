"""One rank's part of a step, as it goes from the loader to the loop.

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
    """A training sample that could not be read; another stands in its place."""

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
    labels_B: torch.Tensor  # int64; of no meaning where `samples` is PADDING
    samples: I64  # [B], numbered as in `TrainPlan`: what the randomness of each row is keyed by
    read_B: I64  # 0 .. N-1, whose pixels stand in each row: the sample of `samples`, or its replacement
    damage: tuple[Damage, ...]
    encoded_B: tuple[Encoded | None, ...] = ()  # what is still to be decoded into its row, on the device
    failure: WastedError | None = None  # why there is no such batch, told in its place: the other ranks must hear of it

    @classmethod
    def failed(cls, error: WastedError) -> Batch:
        """The last batch of a rank that cannot go on."""
        nothing, none = torch.empty(0, dtype=torch.int64), np.empty(0, np.int64)
        return cls(-1, -1, nothing, nothing, none, none, (), failure=error)

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of `size` samples, views of this one."""
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
    """The error of a sample that cannot be used, nor replaced."""
    return DamagedSampleError(
        f"{where} cannot be used: {reason}"
        + (f"; nor can the {MAX_REPLACEMENTS - 1} samples after it" if is_replaced else ""),
        "the result would not cover the whole split",
        "find all that is damaged with `wasteddp verify`, then copy or make the set again",
    )
