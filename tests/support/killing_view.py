"""A view for the tests of decoding processes, which kills the process that decodes certain images."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from wasteddp.data.decoding.crop import Draws, TrainingView
from wasteddp.data.decoding.decode import Encoded, ImageHWC
from wasteddp.order.keyed_random import I64


@dataclass(frozen=True)
class KillingView:
    """As `view`, but kills the process that decodes an image of `deadly` (sha256); once each with a folder `once`."""

    view: TrainingView
    deadly: frozenset[str]
    once: Path | None = None

    def draws(self, samples: I64, epoch: int) -> Draws:
        return self.view.draws(samples, epoch)

    def fill(self, out: ImageHWC, data: bytes, draws: Draws) -> Encoded | None:
        digest = sha256(data).hexdigest()
        if digest in self.deadly and self._is_first(digest):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.view.fill(out, data, draws)

    def _is_first(self, digest: str) -> bool:
        if self.once is None:
            return True
        try:
            (self.once / digest).touch(exist_ok=False)  # of two processes with the same image, one dies
        except FileExistsError:
            return False
        return True
