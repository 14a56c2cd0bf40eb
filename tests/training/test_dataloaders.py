"""The inputs of a run are refused if the ranks would read different data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wasteddp import settings as settings_file
from wasteddp.data.manifest import Manifest
from wasteddp.errors import SettingsError, ShardError
from wasteddp.training.dataloaders import refuse_different_sets


class World:
    """A runtime of three ranks, of which the last reads another manifest."""

    def gather(self, value: Any) -> list[Any]:
        return [value, value, "f" * 64]


def test_ranks_that_read_different_sets_are_refused(small_shards: Path) -> None:
    manifest = Manifest.load(small_shards)
    with pytest.raises(ShardError, match=rf"rank 0 reads the manifest {manifest.sha256[:12]} and rank 2 ffffffffffff"):
        refuse_different_sets(manifest, World())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("workers", "number", "on_a_cpu", "on_a_gpu"),
    [("0", 0, False, True), ("3", 3, False, True), ("3 threads", 3, False, False), ("0 processes", 0, True, True)],
)
def test_workers_are_of_the_kind_that_is_right_or_named(
    workers: str, number: int, on_a_cpu: bool, on_a_gpu: bool
) -> None:
    data = settings_file.parse("", [f"data.workers={workers}"]).data
    assert (data.num_workers, data.uses_processes("cpu"), data.uses_processes("cuda")) == (number, on_a_cpu, on_a_gpu)


@pytest.mark.parametrize("workers", ["-1", "3 thread", "many", "3processes", "'3 processes or so'"])
def test_other_workers_are_refused(workers: str) -> None:
    with pytest.raises(SettingsError, match=r"data\.workers"):
        settings_file.parse("", [f"data.workers={workers}"])
