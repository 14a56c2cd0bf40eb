"""slurm/stage.sh: shards on a node's local disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_staged_copy_is_made_once_verified_each_time_and_removed_if_it_is_damaged(
    small_shards: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "disk" / "shards-1"

    def stage() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = ["bash", str(ROOT / "slurm" / "stage.sh"), str(small_shards), str(copy)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert stage().returncode == 0
    made = copy.stat().st_ctime_ns  # not the inode: its number is reused immediately
    assert stage().returncode == 0
    assert copy.stat().st_ctime_ns == made
    tar = min(copy.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    damaged = stage()
    assert damaged.returncode == 1
    assert tar.name in damaged.stderr
    assert not copy.exists()
    assert stage().returncode == 0
