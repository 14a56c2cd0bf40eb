"""An interrupted evaluation loses nothing: the step is saved, and evaluated when the run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from trainings import config_of, final_weights, rows

from wasteddp import train
from wasteddp.errors import ShardError
from wasteddp.training import dataloaders, evaluate
from wasteddp.training.tracking.tracker import RunTracker
from wasteddp.training.watchdog import exits


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> exits.StopRequest:
    stop = exits.StopRequest()
    for module in (exits, dataloaders, evaluate):
        monkeypatch.setattr(module, "STOP", stop)
    return stop


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train.main(arguments_of(folder, small_shards)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "run"


def arguments_of(folder: Path, shards: Path) -> list[str]:
    return [*config_of(folder, shards), "--set", "checkpoint.every_steps=0", "--set", "train.ema_decay=0.5"]


def unmeasured(run: Path) -> dict[str, float] | None:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    found: dict[str, float] | None = json.loads((newest / "progress.json").read_text())["unmeasured"]
    return found


def interrupted_in(monkeypatch: pytest.MonkeyPatch, nth: int, act: Any) -> None:
    """Call `act` in the first of the two batches of the nth evaluation."""
    real, batches = evaluate.normalise, 0

    def normalise(*arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 2 * nth - 1:
            act()
        return real(*arguments)

    monkeypatch.setattr(evaluate, "normalise", normalise)


def assert_same_run(run: Path, other: Path) -> None:
    ours, theirs = rows(run), rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 9))
    for one, two in zip(ours, theirs, strict=True):
        for name in ("lr", "epoch", "train/loss", "train/grad_norm", "val/loss", "val/accuracy", "best/value"):
            assert one.get(name) == two.get(name), name
    assert final_weights(run) == final_weights(other)
    assert {path.name for path in run.glob("model/*")} == {path.name for path in other.glob("model/*")}  # named by hash


@pytest.mark.parametrize(("nth", "step"), [(1, 4), (2, 8)])
def test_a_signal_ends_an_evaluation_and_the_step_is_measured_when_the_run_goes_on(
    nth: int,
    step: int,
    undisturbed: Path,
    small_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: exits.StopRequest,
) -> None:
    arguments, run = arguments_of(tmp_path, small_shards), tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupted_in(patch, nth, lambda: setattr(stop, "signal_name", "SIGTERM"))
        assert train.main(arguments) == 75
    assert (run / "RESUMABLE").exists()
    assert f"stopped by SIGTERM at step {step} and saved" in (run / "log.txt").read_text()
    assert rows(run)[-1]["step"] == step - 1
    assert (unmeasured(run) or {})["train/loss"] == rows(undisturbed)[step - 1]["train/loss"]

    with monkeypatch.context() as patch:  # and again, during the pending evaluation
        stop.signal_name = ""
        interrupted_in(patch, 1, lambda: setattr(stop, "signal_name", "SIGTERM"))
        assert train.main(arguments) == 75
    assert unmeasured(run) is not None
    stop.signal_name = ""
    assert train.main(arguments) == 0
    assert_same_run(run, undisturbed)
    assert unmeasured(run) is None


def test_a_kill_between_the_row_and_the_checkpoint_doubles_no_row(
    undisturbed: Path,
    small_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: exits.StopRequest,
) -> None:
    arguments = arguments_of(tmp_path, small_shards)
    with monkeypatch.context() as patch:
        interrupted_in(patch, 1, lambda: setattr(stop, "signal_name", "SIGTERM"))
        assert train.main(arguments) == 75
    stop.signal_name = ""
    with monkeypatch.context() as patch:
        patch.setattr(RunTracker, "flush", lambda self: 1 / 0)
        assert train.main(arguments) not in (0, 75)
    assert rows(tmp_path / "run")[-1]["step"] == 4
    assert train.main(arguments) == 0
    assert_same_run(tmp_path / "run", undisturbed)


def test_an_evaluation_that_fails_loses_nothing_of_the_training(
    undisturbed: Path, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: exits.StopRequest
) -> None:
    def fail() -> None:
        raise ShardError("the shard is gone")

    arguments = arguments_of(tmp_path, small_shards)
    with monkeypatch.context() as patch:
        interrupted_in(patch, 1, fail)
        assert train.main(arguments) == 2
    assert (unmeasured(tmp_path / "run") or {})["train/loss"] == rows(undisturbed)[3]["train/loss"]
    assert train.main(arguments) == 0
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_check_that_a_signal_ended_does_not_say_that_it_checked(
    small_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: exits.StopRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted_in(monkeypatch, 1, lambda: setattr(stop, "signal_name", "SIGTERM"))
    assert train.main([*arguments_of(tmp_path, small_shards), "--check"]) == 75
    said = capsys.readouterr().out
    assert "stopped by SIGTERM at step 1" in said
    assert "checked: one step" not in said
    assert not (tmp_path / "run.check").exists()
