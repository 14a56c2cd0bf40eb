"""The simulation with few samples: it counts, proves, and detects errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch import simulate
from launch.benchmarks.datasets import synthetic_set
from wasteddp.data.reader import SplitReader

ROOT = Path(__file__).parents[2]
SMALL = {"samples": 100_003, "ranks": 64, "batch": 4, "shard": 500}


@pytest.mark.parametrize("order", ["1", "7", "500", "3000", "500/2000/1", "64/300/2"])
def test_all_ranks_together_see_each_sample_once(order: str) -> None:
    plan = simulate.plan_of(order, **SMALL)
    parts = [simulate.walk(plan, range(at, at + 16), 64) for at in range(0, 64, 16)]
    assert {part.least for part in parts} == {part.most for part in parts} == {plan.steps_per_epoch * 4}
    assert simulate.covers(plan, parts)
    assert not simulate.covers(plan, parts[1:])
    assert not simulate.covers(plan, [*parts[1:], parts[1]])  # the same number of samples, with one part twice


def test_an_order_is_its_block_window_and_lanes() -> None:
    plan = simulate.plan_of("500/2000/1", **SMALL)
    assert (plan.block, plan.window, plan.lanes) == (500, 2000, 64)
    assert simulate.plan_of("500", **SMALL).lanes == 256
    assert plan.shard_samples[-2:] == (500, 3)


def test_the_command_prints_a_table() -> None:
    command = [sys.executable, "-m", "launch.simulate", "order", "--samples", "100000", "--ranks", "32"]
    command += ["--batch", "4", "--shard", "1000", "--orders", "1,1000,1000/8000/1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    table = [line.split(" | ") for line in done.stdout.splitlines()[-3:]]
    assert [line[1] for line in table] == ["yes, 32 left out"] * 3
    fetched = [float(line[4]) for line in table]
    assert fetched[0] == 4  # each of 4 nodes reads every shard
    assert fetched[1] == fetched[2] < 1.1


def test_a_synthetic_set_is_a_set(tmp_path: Path) -> None:
    manifest = synthetic_set(tmp_path, 23_000)
    assert [shard.num_samples for shard in manifest.split("train").shards] == [10_000, 10_000, 3_000]
    with SplitReader(manifest, "train") as reader:
        assert reader.num_samples == 23_000
        for sample in (0, 9_999, 10_000, 22_999):
            assert reader.read(sample)[:2] == b"\xff\xd8"
