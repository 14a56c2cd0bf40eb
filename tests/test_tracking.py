"""What a run tells: rows that are rolled back with the checkpoint, and a W&B that is never in the way."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from wasteddp.training.tracking import METRICS, RunTracker, rolled_back


def tracker_of(folder: Path, step: int = 0, wandb: str = "disabled", run_id: str = "") -> RunTracker:
    return RunTracker(
        folder, total_steps=10, resumed_step=step, tracker_id=run_id, wandb=wandb, project="test", config={"a": 1}
    )


def test_rows_behind_the_checkpoint_are_rolled_back_and_a_cut_line_with_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lr": 1}\n{"step": 2, "lr": 2}\n{"step": 3, "lr": 3}\n{"step": 4, "l')
    assert rolled_back(path, 2) == [{"step": 1, "lr": 1}, {"step": 2, "lr": 2}]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = tracker_of(tmp_path)
    for step in range(1, 6):
        first.log(step, {"lr": step})
    first.close(1)
    second = tracker_of(tmp_path, step=3)
    for step in range(4, 8):
        second.log(step, {"lr": 10 * step})
    second.close(0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["lr"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70)]


def test_a_metric_that_is_not_in_the_table_is_refused(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path)
    with pytest.raises(KeyError, match="train/los"):
        tracker.log(1, {"train/los": 1.0})
    tracker.close(0)


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    assert all(unit and meaning for unit, meaning in METRICS.values())


def test_wandb_without_a_key_is_offline_without_a_prompt_and_stays_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    began = time.perf_counter()
    tracker = tracker_of(tmp_path / "run", wandb="auto")
    tracker.log(1, {"lr": 0.1})
    tracker.close(0)
    assert time.perf_counter() - began < 60  # 2 s; the bound only catches a prompt or a wait for the network
    said = capsys.readouterr().out
    assert "W&B: offline" in said
    assert "wandb sync" in said
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{tracker.id}/*.wandb"))


def test_a_wandb_that_cannot_start_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(wandb, "init", broken)
    tracker = tracker_of(tmp_path, wandb="offline")
    tracker.log(1, {"lr": 0.1})
    tracker.close(0)
    assert "W&B: none (RuntimeError: no luck)" in capsys.readouterr().out
    assert '"lr": 0.1' in (tmp_path / "metrics.jsonl").read_text()
