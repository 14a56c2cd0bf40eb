"""wasteddp/train.py with the tiny network, for real launchers; only `python -m tests.chaos` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from wasteddp.training.watchdog import exits

if __name__ == "__main__":
    exits.install_handlers()  # as in train.py, before torch is imported

from tests.chaos import inside
from wasteddp import train
from wasteddp.training.watchdog.exits import leave

if __name__ == "__main__":
    inside.prepare(None, Path(), 0)
    leave(train.main())
