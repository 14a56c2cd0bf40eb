"""The training program with ranks that share one GPU, over gloo, since NCCL refuses it. Only tests run it."""

from __future__ import annotations

import os
from functools import partial

from accelerate import PartialState

from wasteddp.train import main
from wasteddp.training.distributed import startup
from wasteddp.training.watchdog import exits
from wasteddp.training.watchdog.exits import leave

if __name__ == "__main__":
    exits.install_handlers()  # as train.py does when it is the program
    os.environ["LOCAL_RANK"] = "0"  # Accelerate takes the device from it, and DDP its number
    assert startup.PartialState is PartialState  # joins the ranks; it is replaced here
    startup.PartialState = partial(PartialState, backend="gloo")  # type: ignore[assignment,misc]
    leave(main())
