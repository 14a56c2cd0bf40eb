"""One of two real processes raises, hangs, is stopped or is killed: the other one stops soon and reports which."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from trainings import CPU2, ROOT, config_of, final_weights, launch, rows

FAULTY = Path(__file__).parent / "faulty.py"


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
        ("kill", 70, ["rank 1 of 2 does not respond any more", "rank 1: step 2, computing"]),
        ("reader", 70, ["the others wait for rank 1 of 2", "waiting for data", "(decode_0 has been at", "train-0000"]),
        ("damage", 2, ["train-000000.tar is full of holes", "do: copy it again", "at: rank 1, step"]),
    ],
)
def test_a_rank_that_fails_stops_the_others_and_is_named(
    fault: str, code: int, said: list[str], small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "8")  # how long the launcher waits for a stopped rank
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = [fault, *config_of(tmp_path, small_shards), "--set", "run.timeout_s=5"]
    done = launch(arguments, "--config_file", str(CPU2), program=FAULTY)
    assert done.returncode != 0
    for words in said:
        assert words in done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert f"exitcode  : {code}" in done.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("step-0000000*/complete.json"))
    assert said[0] in (tmp_path / "run" / "log.txt").read_text()
    # the launcher may have killed rank 0 by now; the process that writes the report continues
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "report.html").exists():
        assert time.monotonic() < until, "no report"
        time.sleep(0.1)


def test_a_step_that_one_rank_spoils_is_skipped_on_all(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = ["poison", *config_of(tmp_path, small_shards), "--set", "train.on_divergence=skip"]
    done = launch(arguments, "--config_file", str(CPU2), program=FAULTY)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "train/loss" not in row] == [2]
    assert [row["train/skipped"] for row in found] == [0] + [1] * 7
    assert all(torch.isfinite(tensor.float()).all() for tensor in load(final_weights(tmp_path / "run")).values())
