"""A run that only tracks: rows without a training, in this process or, to be killed, in its own process.

python tracked.py FOLDER FIRST LAST RESUMED_STEP END
END: "finish"; "wait": rows, then a wait for the kill
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from wasteddp.settings import Track
from wasteddp.training.tracking.tracker import RunTracker
from wasteddp.training.tracking.wandb_client import RunIdentity

LABEL = RunIdentity(
    id="run1", name="tracked", project="tests", entity="", group="seeds", job_type="train", tags=("small", "cpu"),
    config={"optimizer": {"lr": 0.1}, "hashes": {"manifest": "0" * 64}},
    dataset={"name": "sample set", "uri": "file:///shards/sample", "manifest": "0" * 64, "samples": {"train": 5}},
)  # fmt: skip


def tracker_of(folder: Path, *, resumed_step: int = 0, wandb: str = "auto", **track: Any) -> RunTracker:
    return RunTracker(
        folder,
        LABEL,
        track=Track(wandb=wandb, **track),
        total_steps=10,
        resumed_step=resumed_step,  # type: ignore[arg-type]
    )


def log(tracker: RunTracker, first: int, last: int) -> None:
    """Log rows of the steps `first` .. `last`; every fifth has an evaluation."""
    for step in range(first, last + 1):
        scores = {"val/accuracy": step / 100, "val/loss": 1 / step} if step % 5 == 0 else {}
        tracker.log(step, {"train/loss": 1 / step, **scores})


if __name__ == "__main__":
    folder, first, last, resumed, end = sys.argv[1:]
    tracker = tracker_of(Path(folder), resumed_step=int(resumed), finish_s=4)
    log(tracker, int(first), int(last))
    print("logged", flush=True)
    if end == "wait":
        time.sleep(600)
    sys.stdin.readline()  # until the test ends it
    tracker.close(0)
