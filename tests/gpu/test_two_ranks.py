"""Two ranks that share one GPU over gloo: the samples and nearly the weights of one rank, and resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_waits import ON_A_GPU
from safetensors.torch import load
from trainings import ROOT, config_of, final_weights, kill_all, rows

pytestmark = [*ON_A_GPU, pytest.mark.slow]

DEVICE = "cuda"
PROGRAM = Path(__file__).with_name("sharing.py")


def arguments_of(folder: Path, shards: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    return [*config_of(folder, shards), "--set", "run.record_steps=true", "--set", "train.ema_decay=0.5"]


def command(ranks: int, arguments: list[str]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(PROGRAM), *arguments]


def launch(ranks: int, arguments: list[str]) -> str:
    done = subprocess.run(command(ranks, arguments), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ranks} x {DEVICE}" in done.stdout
    return done.stdout


def steps(run: Path) -> list[tuple[Any, Any]]:
    """Return the hashes of the samples and of the images of each step."""
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return [(line["samples"], line["images"]) for line in lines]


def assert_near(run: Path, other: Path) -> None:
    """Compare the last weights: cuDNN, and two ranks, add in another order each time."""
    weights, others = load(final_weights(run)), load(final_weights(other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        if "running" not in name and "num_batches" not in name:  # each rank has its own; the checkpoint has the mean
            assert torch.allclose(tensor, others[name], atol=5e-3), name


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("sharing") / "two"
    said = launch(2, arguments_of(folder, small_shards))
    assert "2 processes x 6 images x 1 accumulated" in said
    return folder / "run"


def test_two_ranks_take_the_samples_of_one_and_nearly_its_steps(
    two: Path, small_shards: Path, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    launch(1, arguments_of(tmp_path, small_shards))
    one = tmp_path / "run"
    assert len(steps(one)) == 8
    assert steps(one) == steps(two)
    for run in (one, two):
        assert [row["coverage/ok"] for row in rows(run) if "coverage/ok" in row] == [1, 1]
        assert {row["val/samples"] for row in rows(run) if "val/samples" in row} == {13}
    assert rows(two)[0]["train/loss"] == pytest.approx(rows(one)[0]["train/loss"], rel=1e-3)
    assert_near(one, two)
    stalls = [max(row["checkpoint/stall_ms"] for row in rows(run)) for run in (one, two)]
    measured(f"longest wait for a checkpoint of a ResNet18: one rank {stalls[0]:.1f} ms, two {stalls[1]:.1f} ms")


def test_a_checkpoint_of_two_ranks_has_the_statistics_of_each_and_the_average(two: Path) -> None:
    newest = sorted((two / "checkpoints").glob("step-*"))[-1]
    ranks, model = (load((newest / f"{name}.safetensors").read_bytes()) for name in ("ranks", "model"))
    assert len(ranks["running_statistics"]) == 2
    means = torch.cat([t.reshape(-1) for name, t in model.items() if "running_mean" in name])
    assert means.isfinite().all()
    assert means.any()
    assert load((newest / "ema.safetensors").read_bytes()).keys() == model.keys()


def test_two_ranks_that_are_killed_go_on_as_two(two: Path, small_shards: Path, tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, small_shards)
    with subprocess.Popen(command(2, arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 5/8"):
                kill_all(arguments)
    assert rows(tmp_path / "run")[-1]["step"] < 8, "the run had ended before it was killed"
    launch(2, arguments)
    assert rows(tmp_path / "run")[-1]["attempt"] == 2
    assert steps(tmp_path / "run")[-1] == steps(two)[-1]
    assert_near(tmp_path / "run", two)


def test_one_rank_goes_on_where_two_were(two: Path, small_shards: Path, tmp_path: Path) -> None:
    from_7 = ["--resume", str(two / "checkpoints" / "step-00000007")]
    launch(1, [*arguments_of(tmp_path, small_shards), *from_7])
    assert steps(tmp_path / "run") == steps(two)[-1:]
    assert rows(tmp_path / "run")[-1]["train/loss"] == pytest.approx(rows(two)[-1]["train/loss"], rel=1e-2)
    assert_near(tmp_path / "run", two)
