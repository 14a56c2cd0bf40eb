"""TensorBoard shows what metrics.jsonl has: each step once, after any number of starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from wasteddp.errors import SettingsError
from wasteddp.training.tracking.mirrors import TensorBoardMirror


@pytest.fixture
def _installed() -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'wasteddp[tensorboard]'")


def rows(first: int, last: int, factor: float = 1.0) -> list[dict[str, float]]:
    return [{"step": step, "time_s": 1.8e9 + step, "train/loss": factor * step} for step in range(first, last + 1)]


def mirror_of(folder: Path, said: list[str], *, resumed_step: int = 0, history: Any = ()) -> TensorBoardMirror:
    return TensorBoardMirror(folder, resumed_step=resumed_step, history=history, say=said.append)


def read_back(folder: Path) -> list[tuple[int, float, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value, event.wall_time) for event in events.Scalars("train/loss")]


@pytest.mark.usefixtures("_installed")
def test_a_run_that_was_killed_and_went_on_has_each_step_once(tmp_path: Path) -> None:
    first = mirror_of(tmp_path, [])
    for row in rows(1, 3):
        first.log(row)
    first.flush()  # before the checkpoint of step 3
    for row in rows(4, 6, factor=100):
        first.log(row)
    first.close()  # the most that a kill can leave
    second = mirror_of(tmp_path, [], resumed_step=3, history=rows(1, 3))
    for row in rows(4, 8):
        second.log(row)
    second.close()
    assert read_back(tmp_path) == [(step, step, 1.8e9 + step) for step in range(1, 9)]


@pytest.mark.usefixtures("_installed")
def test_switched_on_in_the_middle_of_a_run_it_has_the_rows_from_before(tmp_path: Path) -> None:
    said: list[str] = []
    mirror = mirror_of(tmp_path, said, resumed_step=5, history=rows(1, 5))
    for row in rows(6, 7):
        mirror.log(row)
    mirror.close()
    assert [step for step, *_ in read_back(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert said == [f"TensorBoard: tensorboard --logdir {tmp_path}"]


@pytest.mark.usefixtures("_installed")
def test_what_fails_in_it_is_reported_once_and_ends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    mirror = mirror_of(tmp_path, said)
    mirror.log({"step": 1, "time_s": 1.8e9, "train/loss": "no number"})
    for row in rows(2, 4):
        mirror.log(row)
    mirror.close()
    assert len(said) == 2
    assert "metrics.jsonl has every row" in said[1]


def test_without_the_package_the_setting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'wasteddp\[tensorboard\]'"):
        mirror_of(tmp_path, [])
    assert not (tmp_path / "tensorboard").exists()
