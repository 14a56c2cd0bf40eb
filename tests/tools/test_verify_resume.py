"""`wasteddp verify-resume`: the proof holds for the program, and fails if runs differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from trainings import CONFIG

from wasteddp import cli, settings
from wasteddp.errors import CheckpointError
from wasteddp.tools import verify_resume
from wasteddp.tools.verify_resume import Kill, Proof, compare

KILL = Kill(1, 1, "SIGKILL", 2, 0.1, 2, (-9,))


def write_run(run: Path, *, steps: int = 3, **other: str) -> Path:
    """Write the files of a run that are compared; `other` replaces a hash in step 2."""
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    weights = other.get("final", "f" * 64)
    (run / "checkpoints" / "step-00000003" / "complete.json").write_text(
        json.dumps({"sha256": {"model.safetensors": weights}})
    )
    rows = [{"step": s, "samples": f"s{s}", "images": f"i{s}", "weights": f"w{s}"} for s in range(1, steps + 1)]
    rows[1] |= {name: value for name, value in other.items() if name in rows[1]}
    (run / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = [{"step": s, "train/loss": float(other.get("loss", 1)) if s == 2 else 1.0} for s in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in losses) + '{"step": 4, "tra')
    return run


def proof_of(folder: Path, processes: tuple[int, ...] = (1,), **other: str) -> Proof:
    undisturbed, interrupted = write_run(folder / "undisturbed"), write_run(folder / "interrupted", **other)
    return compare(
        undisturbed, interrupted, precision="fp32", deterministic=False, seed=1, processes=processes, kills=[KILL]
    )  # fmt: skip


def test_equal_runs_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof = proof_of(tmp_path)
    assert proof.holds
    assert len(proof.rows) == 3
    verify_resume.refuse(proof, tmp_path)
    verify_resume.show(proof, tmp_path)
    said = capsys.readouterr().out
    assert "w2 = w2" in said
    assert "the same in every step" in said
    assert "SIGKILL" in said


@pytest.mark.parametrize("name", ["samples", "images", "weights"])
def test_a_difference_is_named_with_its_step(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof = proof_of(tmp_path, **{name: "other"})
    assert not proof.holds
    with pytest.raises(CheckpointError, match="first in step 2"):
        verify_resume.refuse(proof, tmp_path)
    verify_resume.show(proof, tmp_path)
    assert "≠" in capsys.readouterr().out


def test_other_numbers_of_processes_need_the_same_samples_only(tmp_path: Path) -> None:
    proof = proof_of(tmp_path, processes=(1, 2), weights="other", loss="1.001", final="0" * 64)
    assert proof.holds
    assert proof.largest_loss_difference == pytest.approx(0.001)
    assert not replace(proof, same_samples=False).holds


def test_other_statistics_at_the_end_are_noticed(tmp_path: Path) -> None:
    proof = proof_of(tmp_path, final="0" * 64)
    assert not proof.holds
    with pytest.raises(CheckpointError, match="first in the statistics at the end"):
        verify_resume.refuse(proof, tmp_path)


def test_the_receipt_records_whether_sums_have_a_fixed_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = proof_of(tmp_path, weights="other")
    assert not proof.deterministic
    with pytest.raises(CheckpointError, match=r"--set run\.deterministic=true"):
        verify_resume.refuse(proof, tmp_path)
    verify_resume.show(proof, tmp_path)
    assert "run.deterministic" not in capsys.readouterr().out
    fixed = replace(proof, deterministic=True)
    with pytest.raises(CheckpointError) as raised:
        verify_resume.refuse(fixed, tmp_path)
    assert "run.deterministic" not in str(raised.value)
    verify_resume.show(fixed, tmp_path)
    assert "run.deterministic: kernels and ranks add in a fixed order, in both runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("has_gpu", "asked", "expected"),
    [(True, [], True), (False, [], False), (True, ["run.deterministic=false"], False)],
)
def test_on_a_gpu_both_runs_are_deterministic(
    has_gpu: bool, asked: list[str], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    started: list[bool] = []

    class Finished(verify_resume.Processes):
        @classmethod
        def start(cls, arguments: Sequence[str], num: int, run: Path) -> Finished:
            overrides = [value for key, value in pairwise(arguments) if key == "--set"]
            started.append(settings.load(arguments[1], overrides).run.deterministic)
            if not run.exists():
                write_run(run)
            return cls([], run)

    monkeypatch.setattr(verify_resume, "Processes", Finished)
    monkeypatch.setattr(verify_resume, "_kill", lambda *_: KILL)
    monkeypatch.setattr(verify_resume, "_finish", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    command = ["verify-resume", "--config", str(tmp_path / "c.yaml"), "--steps", "3", "--kills", "1"]
    command += [part for override in asked for part in ("--set", override)]
    assert cli.main([*command, "--out", str(tmp_path / "proof")]) == 0
    assert started == [expected] * 3
    assert json.loads((tmp_path / "proof" / "receipt.json").read_text())["deterministic"] is expected


def test_more_kills_than_steps_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["verify-resume", "--config", str(tmp_path / "c.yaml"), "--steps", "2", "--kills", "2"])
    assert "2 kills and 2 steps" in capsys.readouterr().err


@pytest.mark.usefixtures("forked_ranks")
def test_a_real_training_is_killed_and_proved(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    out = tmp_path / "proof"
    command = ["verify-resume", "--config", str(tmp_path / "c.yaml"), "--set", f"data.shards={small_shards}"]
    assert cli.main([*command, "--steps", "6", "--kills", "1", "--seed", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "weights: the same, bit for bit" in said
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["holds"]
    assert [row["step"] for row in receipt["rows"]] == [1, 2, 3, 4, 5, 6]
    assert not (out / "undisturbed").exists()
