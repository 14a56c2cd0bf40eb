"""Tracking a run: rows are rolled back to the checkpoint, and errors of W&B do not affect the run."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
from tracked import log, tracker_of
from trainings import rows

from wasteddp.training.tracking.journal import METRICS, is_known, roll_back
from wasteddp.training.tracking.tracker import ConsoleTracker
from wasteddp.training.tracking.wandb_sync import BEST, MEDIA


def test_rows_after_the_checkpoint_are_rolled_back_and_a_cut_line_with_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lr": 1}\n{"step": 2, "lr": 2}\n{"step": 3, "lr": 3}\n{"step": 4, "l')
    assert roll_back(path, 2) == [{"step": 1, "lr": 1}, {"step": 2, "lr": 2}]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_damaged_row_is_named_and_ends_no_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xf4p": 2}\n{"step"; 3}\n{"step": 4}\n{"step"')
    said: list[str] = []
    assert roll_back(path, 9, said.append) == [{"step": 1}, {"step": 4}]
    [line] = said  # the last line was cut by a kill
    assert "2 damaged line(s) are not rows of metrics; they are moved to metrics-damaged.jsonl" in line
    assert len((tmp_path / "metrics-damaged.jsonl").read_text().splitlines()) == 2
    assert roll_back(path, 9, said.append) == [{"step": 1}, {"step": 4}]
    assert len(said) == 1


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = tracker_of(tmp_path, wandb="disabled")
    for step in range(1, 6):
        first.log(step, {"lr": step})
    first.close(1)
    second = tracker_of(tmp_path, resumed_step=3, wandb="disabled")
    for step in range(4, 8):
        second.log(step, {"lr": 10 * step})
    second.close(0)
    found = [(row["step"], row["lr"]) for row in rows(tmp_path)]
    assert found == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70)]


def test_a_metric_that_is_not_in_the_table_is_refused(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path, wandb="disabled")
    with pytest.raises(KeyError, match="train/los"):
        tracker.log(1, {"train/los": 1.0})
    tracker.close(0)


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    assert all(unit and meaning for unit, meaning in METRICS.values())
    assert BEST.keys() <= METRICS.keys()
    assert not MEDIA.keys() & METRICS.keys()


def test_classes_and_ranks_have_metrics_of_their_own() -> None:
    assert is_known("val/recall/glass")
    assert is_known("val/recall/paper, coated/other")
    assert is_known("rank/12/images_per_s")
    assert not is_known("val/recalls/glass")
    assert not is_known("rank/12/images")


def test_the_log_hides_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "correct-horse-battery")
    tracker = tracker_of(tmp_path, wandb="disabled")
    tracker.say("opened s3://user:hunter2hunter2@store/x with correct-horse-battery")
    tracker.close(0)
    assert "opened s3://[hidden]@store/x with [hidden]" in (tmp_path / "log.txt").read_text()


def test_a_wandb_that_cannot_start_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(wandb, "init", broken)
    tracker = tracker_of(tmp_path, wandb="offline")
    log(tracker, 1, 3)
    tracker.close(0)
    said = capsys.readouterr().out
    assert "W&B: not available for run run1 (RuntimeError: no luck); send it later with: wasteddp sync" in said
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_pictures_that_cannot_be_made_do_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    tracker = tracker_of(tmp_path, wandb="offline")
    tracker.show(5, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    tracker.close(0)
    assert "the images of step 5 could not be stored: ZeroDivisionError" in capsys.readouterr().out


def test_a_full_disk_under_standard_output_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys.stdout, "write", full)
    ConsoleTracker().say("a line")
