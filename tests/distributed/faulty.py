"""The training program with one injected fault, for tests: faulty.py FAULT --config ...

raise, sleep, stop, kill      rank 1 does this at the end of its second step
reader                        the loader of rank 1 hangs at a sample of its third batch or later
damage                        rank 1 reads damaged samples that cannot be replaced
poison                        the images of rank 1 are NaN in its second step
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from wasteddp.data.augmentation.augment import Augment
from wasteddp.data.loader import Loader
from wasteddp.errors import DamagedSampleError
from wasteddp.train import main
from wasteddp.training.meter import Meter
from wasteddp.training.watchdog import exits
from wasteddp.training.watchdog.exits import leave


def at_second_step(fault: str) -> None:
    real, steps = Meter.step_done, iter(range(100))

    def step_done(self: Meter, *arguments: Any) -> None:
        real(self, *arguments)
        if next(steps) == 1:
            if fault == "raise":
                raise ZeroDivisionError("injected")
            if fault == "sleep":
                time.sleep(600)
            time.sleep(2)  # the other ranks have received its position
            os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[fault])

    Meter.step_done = step_done  # type: ignore[method-assign]


def in_loader(fault: str) -> None:
    real, rows = Loader._read_row, iter(range(10_000))

    def fill_row(self: Loader, *arguments: Any) -> int:
        if next(rows) > 20:
            if fault == "damage":
                raise DamagedSampleError("train-000000.tar is full of holes", "", "copy it again")
            time.sleep(600)
        return real(self, *arguments)

    Loader._read_row = fill_row  # type: ignore[method-assign]


def poison() -> None:
    real, calls = Augment.__call__, iter(range(10_000))

    def poisoned(self: Augment, *arguments: Any) -> torch.Tensor:
        return real(self, *arguments) * (float("nan") if next(calls) == 1 else 1)

    Augment.__call__ = poisoned  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "support"))
    importlib.import_module("narrow").install()
    exits.install_handlers()  # as train.py does when it is run as a program
    name = sys.argv.pop(1)
    if os.environ["RANK"] == "1":
        if name == "poison":
            poison()
        elif name in ("reader", "damage"):
            in_loader(name)
        else:
            at_second_step(name)
    leave(main())
