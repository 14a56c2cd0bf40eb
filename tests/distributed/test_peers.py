"""The comparison with plain webdataset and accelerate runs, and shows what these libraries do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ours_sees_each_sample_once_and_the_others_do_what_the_table_reports() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.peers"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in done.stdout.splitlines()[4:]
    }
    # 22 samples, 5 steps of 4: the 2 that do not fill a batch are left out, different ones in each epoch
    assert rows["wasteddp"] == ["5 and 5", "20", "2", "0", "both at the same step"]
    assert "hung" in rows["webdataset, split_by_node"][-1]
    for way in ("the same through accelerator.prepare", "the same, dispatch_batches=False"):
        assert int(rows[way][2]) > 2, "accelerate loses fewer samples than it did: look at docs/streaming.md"
