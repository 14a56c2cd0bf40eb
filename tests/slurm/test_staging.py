"""slurm/stage.sh: shards on a node's local disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert damaged.returncode == 2
    assert tar.name in damaged.stderr
    assert [path.name for path in copy.parent.iterdir()] == ["shards-1.lock"]
    assert stage().returncode == 0


@pytest.mark.parametrize(
    ("program", "text", "left"),
    [
        ("cp", 'mkdir "$3"; touch "$3/train-000000.tar"; exit 1', set()),
        ("cp", 'mkdir "$3"; touch "$3/train-000000.tar"; kill -TERM $PPID; sleep 0.2', set()),
        ("python", "exit 1", {"copy"}),
        ("python", "kill -TERM $$", {"copy"}),
    ],
)
def test_a_failure_leaves_no_part_of_a_copy_and_removes_none_that_others_may_read(
    tmp_path: Path, program: str, text: str, left: set[str]
) -> None:
    """A verification that ends for another reason than damage says nothing about the copy."""
    stand_in = tmp_path / "bin" / program
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/bin/bash\n{text}\n")
    stand_in.chmod(0o755)
    (tmp_path / "shards").mkdir()
    command = ["bash", str(ROOT / "slurm" / "stage.sh"), str(tmp_path / "shards"), str(tmp_path / "disk" / "copy")]
    environment = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode not in (0, 2)
    assert {path.name for path in (tmp_path / "disk").iterdir()} == left | {"copy.lock"}
