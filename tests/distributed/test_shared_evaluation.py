"""`wasteddp evaluate` in two processes: they share a split and get the same result as one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_run import write_run
from trainings import run_ranks

from wasteddp import cli
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 test images in batches of 64: rank 0 has the first batch and the rest, rank 1 the second."""
    return write_run(tmp_path_factory.mktemp("evaluated"), test_images=(60, 50, 40))


def test_two_processes_find_what_one_finds(run: Path) -> None:
    assert cli.main(["evaluate", str(run), "--split", "test"]) == 0
    folder = run / "evaluations" / "test"
    one = json.loads((folder / "metrics.json").read_text())
    predictions = (folder / "predictions.csv").read_text().splitlines()
    shutil.rmtree(folder)
    done = run_ranks(["-m", "wasteddp.cli", "evaluate", str(run), "--split", "test"], 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1
    two = json.loads((folder / "metrics.json").read_text())
    assert two["num_samples"] == 150
    for name in ("confusion", "per_class", "accuracy", "accuracy_low", "macro_f1", "hashes"):
        assert two[name] == one[name]
    assert [line.split(",")[0] for line in (folder / "predictions.csv").read_text().splitlines()] == [
        line.split(",")[0] for line in predictions
    ]


def test_a_damaged_sample_is_reported_once_and_ends_both(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent, tmp_path / "all", ignore=shutil.ignore_patterns("evaluations"))
    manifest = Manifest.load(tmp_path / "all" / "shards")
    with SplitReader(manifest, "test") as reader:
        (shard,), (record,) = reader.records(np.array([100]))  # a sample of rank 1
    tar = tmp_path / "all" / "shards" / manifest.split("test").shards[int(shard)].tar
    content = bytearray(tar.read_bytes())
    content[int(record["offset"]) + int(record["length"]) // 2] ^= 0xFF
    tar.write_bytes(content)
    shards = ["--shards", str(tmp_path / "all" / "shards")]
    arguments = ["-m", "wasteddp.cli", "evaluate", str(tmp_path / "all" / "run"), "--split", "test", *shards]
    done = run_ranks(arguments, 2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert not (tmp_path / "all" / "run" / "evaluations").exists()
