"""One of two real processes raises, hangs, is stopped or is killed: the other one stops soon and reports which."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from trainings import CPU2, ROOT, config_of, final_weights, launch, rows, run_ranks

FAULTY = Path(__file__).parent / "faulty.py"


def check(said: list[str], stderr: str, run: Path) -> None:
    for words in said:
        assert words in stderr
    assert stderr.count("error: ") == 1, stderr
    assert list((run / "checkpoints").glob("step-0000000*/complete.json"))
    assert said[0] in (run / "log.txt").read_text()
    # the launcher may have killed rank 0 meanwhile; what writes the report goes on
    until = time.monotonic() + 60
    while not (run / "report.html").exists():
        assert time.monotonic() < until, "no report"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("raise", 70, ["rank 1, step 2, computing: ZeroDivisionError: injected", "in step_done"]),
        (
            "sleep",
            70,
            ["the others wait for rank 1 of 2", "rank 1: step 2, computing", "rank 0: step 2, waiting for"],
        ),
        ("stop", 70, ["rank 1 of 2 does not respond any more", "rank 1: step 2, computing"]),
        (
            "reader",
            70,
            ["the others wait for rank 1 of 2", "waiting for data", "(decode_0 has been at", "train-0000"],
        ),
        ("damage", 2, ["train-000000.tar is full of holes", "do: copy it again", "at: rank 1, step"]),
    ],
)
def test_a_rank_that_fails_stops_the_others_and_is_named(
    fault: str, code: int, said: list[str], small_shards: Path, tmp_path: Path
) -> None:
    arguments = [fault, *config_of(tmp_path, small_shards), "--set", "run.timeout_s=5"]
    done = run_ranks(arguments, 2, program=FAULTY, grace_s=1 if fault == "stop" else 8)
    assert done.returncode == code, done.stderr
    check(said, done.stderr, tmp_path / "run")


def test_a_rank_that_is_killed_is_named_before_the_launcher_ends_the_others(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "8")  # how long the launcher waits for a stopped rank
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = ["kill", *config_of(tmp_path, small_shards), "--set", "run.timeout_s=5"]
    done = launch(arguments, "--config_file", str(CPU2), program=FAULTY)
    assert done.returncode != 0
    assert "exitcode  : 70" in done.stderr
    check(["rank 1 of 2 does not respond any more", "rank 1: step 2, computing"], done.stderr, tmp_path / "run")


def test_a_step_that_one_rank_spoils_is_skipped_on_all(small_shards: Path, tmp_path: Path) -> None:
    arguments = ["poison", *config_of(tmp_path, small_shards), "--set", "train.on_divergence=skip"]
    done = run_ranks(arguments, 2, program=FAULTY)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "train/loss" not in row] == [2]
    assert [row["train/skipped"] for row in found] == [0] + [1] * 7
    assert all(torch.isfinite(tensor.float()).all() for tensor in load(final_weights(tmp_path / "run")).values())
