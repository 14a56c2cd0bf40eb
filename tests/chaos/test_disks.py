"""A sample of power cuts, and of faults at every nth call. `python -m tests.chaos` has the long forms."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import pytest

from .disk import Operation
from .test_chaos import chaos
from .unsynced import WAYS, Disk, IncompleteError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")), reason="needs Linux and a C compiler"
)


@pytest.mark.slow
def test_nothing_is_lost_in_a_power_cut(tmp_path: Path) -> None:
    ended = "6 points"  # of a training 4, of a sharding 2
    said = chaos(
        tmp_path, "--power-loss", "8", "--programs", "train", "shard", ends="as the undisturbed one, none lost"
    )
    assert ended in said


def test_a_fault_of_any_call_costs_nothing(tmp_path: Path) -> None:
    said = chaos(tmp_path, "--every-nth", "--share", "0.05", "--programs", "shard", ends="none lost")
    assert "a message (2)" in said
    assert "finished all the same" in said


def states(root: Path, operations: list[Operation]) -> dict[str, dict[str, bytes]]:
    """Return the content of each file, by what the cut leaves."""
    found = {}
    for way in WAYS:
        disk = Disk(root)
        for operation in operations:
            disk.do(operation)
        disk.write(root.with_name("left"), way, random.Random(3))
        left = sorted(root.with_name("left").rglob("*"))
        found[way] = {str(path.relative_to(root.with_name("left"))): path.read_bytes() for path in left}
    return found


def test_a_cut_keeps_what_was_synced_and_loses_the_rest(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").write_bytes(b"old")
    path = str(root / "new.tmp")
    renamed = [
        Operation("create", path),
        Operation("write", path, data=b"new"),
        Operation("rename", path, str(root / "old")),
    ]
    left = states(root, renamed)
    assert left["nothing"] == left["bytes"] == {"old": b"old"}
    assert left["names"] == {"old": b""}  # the reason for the fsync before a rename
    assert left["zeros"] == {"old": bytes(3)}
    assert left["all"] == {"old": b"new"}
    synced = [*renamed[:2], Operation("fsync", path), renamed[2]]
    assert {content for files in states(root, synced).values() for name, content in files.items() if name == "old"} == {
        b"old",
        b"new",
    }
    durable = [*synced, Operation("fsync", str(root))]
    assert all(files == {"old": b"new"} for files in states(root, durable).values())


def test_what_was_done_and_not_recorded_is_found(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.check()
    (tmp_path / "new").write_bytes(b"")
    with pytest.raises(IncompleteError, match="new"):
        disk.check()
