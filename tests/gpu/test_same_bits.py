"""Trainings on one GPU: the same bits with run.deterministic, killed or not; nearly the same without it."""

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
from test_determinism import everything
from trainings import ROOT, config_of, final_weights, kill_all, launch, launch_command, rows

pytestmark = [*ON_A_GPU, pytest.mark.slow]

DEVICE = "cuda"
# bf16 uses other kernels than fp32, and channels_last others than contiguous memory
WAYS = [
    {"precision": "fp32"},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"precision": "bf16", "model__channels_last": "false"},
    {"precision": "bf16", "model__compile": "true", "schedule__start_size": "32"},
]


def plain(folder: Path, shards: Path, *overrides: str) -> list[str]:
    """Return the arguments of a training of twelve steps in `folder / run`, without run.deterministic."""
    folder.mkdir()
    overrides = ("run.record_steps=true", "train.epochs=3", *overrides)
    return config_of(folder, shards) + [part for override in overrides for part in ("--set", override)]


def train(arguments: list[str]) -> str:
    done = launch(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"1 x {DEVICE}" in done.stdout
    return done.stdout


def train_and_kill(arguments: list[str], run: Path) -> None:
    """Send SIGKILL after the third of the twelve steps, then run the same command again."""
    with subprocess.Popen(launch_command(arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/12"):
                kill_all(arguments)
    assert rows(run)[-1]["step"] < 12, "the run had ended before it was killed"
    train(arguments)
    assert rows(run)[-1]["attempt"] == 2


def steps(run: Path) -> dict[int, dict[str, Any]]:
    """Return the hashes of samples, images and weights by step; for a repeated step, the later ones."""
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def inputs(run: Path) -> list[tuple[Any, Any]]:
    return [(line["samples"], line["images"]) for line in steps(run).values()]


def flat(weights: bytes) -> torch.Tensor:
    """Return all weights in the order of their names, without BatchNorm's statistics."""
    named = sorted(load(weights).items())  # safetensors does not define an order
    return torch.cat([t.reshape(-1).float() for name, t in named if "running" not in name and "num_b" not in name])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
def test_two_deterministic_runs_and_a_killed_one_end_with_the_same_bits(
    way: dict[str, str], small_shards: Path, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    one, other, killed = (
        everything(tmp_path / name, small_shards, train__epochs="3", **way) for name in ("one", "other", "killed")
    )
    assert ", deterministic;" in train(one)
    train(other)
    train_and_kill(killed, tmp_path / "killed" / "run")
    first, *others = (tmp_path / name / "run" for name in ("one", "other", "killed"))
    assert list(steps(first)) == list(range(1, 13))
    for run in others:
        assert steps(run) == steps(first)
        assert final_weights(run) == final_weights(first)
    step_ms = min(row["train/step_ms"] for row in rows(first) if "train/step_ms" in row)
    measured(f"deterministic step of 12 images of 32 px, ResNet18, {' '.join(way.values())}: {step_ms:.1f} ms at least")


def test_a_killed_run_takes_the_images_of_an_undisturbed_one_and_comes_near_its_weights(
    small_shards: Path, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    train(plain(tmp_path / "undisturbed", small_shards))
    train_and_kill(plain(tmp_path / "killed", small_shards), tmp_path / "killed" / "run")
    undisturbed, killed = (tmp_path / name / "run" for name in ("undisturbed", "killed"))
    assert len(inputs(undisturbed)) == 12
    assert inputs(killed) == inputs(undisturbed)
    losses, others = ([row["train/loss"] for row in rows(run) if "train/loss" in row] for run in (undisturbed, killed))
    assert others == pytest.approx(losses, rel=1e-2)
    weights, near = flat(final_weights(undisturbed)), flat(final_weights(killed))
    apart = float((weights - near).norm() / weights.norm())
    measured(f"weights of a killed and an undisturbed run without run.deterministic: {apart:.1e} of their norm apart")
    assert apart < 1e-3


def test_processes_that_decode_feed_a_gpu_as_threads_do(small_shards: Path, tmp_path: Path) -> None:
    ways = ("2 processes", "2 threads", "1 processes")
    for number, workers in enumerate(ways):
        train(plain(tmp_path / str(number), small_shards, f"data.workers={workers}"))
    one, *others = (tmp_path / str(number) / "run" for number in range(len(ways)))
    assert len(inputs(one)) == 12
    for run in others:
        assert inputs(run) == inputs(one)
        assert [row.get("val/samples") for row in rows(run)] == [row.get("val/samples") for row in rows(one)]


def test_verify_resume_proves_the_weights_on_a_gpu(small_shards: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, small_shards)[:4]  # without run.out
    command = [sys.executable, "-m", "wasteddp.cli", "verify-resume", *config, "--out", str(tmp_path / "proof")]
    command += ["--steps", "6", "--kills", "1", "--seed", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run.deterministic: kernels and ranks add in a fixed order" in done.stdout
    assert "weights: the same, bit for bit" in done.stdout
