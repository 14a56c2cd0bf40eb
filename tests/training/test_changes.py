"""A run that is started again with a change: what is counted again, what is measured again, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from small_run import write_images
from trainings import config_of, edit_progress, rows

from wasteddp import train
from wasteddp.sharding.build import Job, Options, make_shards

GROWN = {"train": (20, 22, 20), "val": (5, 5, 5)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    """A run of two epochs of four steps, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    more = ("--set", "checkpoint.every_steps=1", "--set", "checkpoint.keep_last=9")
    assert train.main([*config_of(folder, small_shards), *more]) == 0
    return folder / "run"


def begin_at(step: int, finished: Path, out: Path) -> Path:
    """A copy of the run as a kill after `step` leaves it."""
    shutil.copytree(finished, out)
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return out


def progress_of(run: Path) -> dict[str, object]:
    newest = max((run / "checkpoints").glob("step-*"))
    found: dict[str, object] = json.loads((newest / "progress.json").read_text())
    return found


def content(folder: Path) -> dict[str, str]:
    """The sha256 of all files but the log, which has each refusal, and the mark of a mistake."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "log.txt", "MISTAKE"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sets(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


@pytest.mark.parametrize(
    ("accepted", "changes"),
    [
        ("seed", ("run.seed=5",)),
        ("batch_size,lanes", ("train.batch_size=6",)),
        ("block,window", ("data.block=4", "data.window=8")),
        ("balance", ("data.balance=1",)),
        ("seed,balance", ("run.seed=5", "data.balance=1")),
    ],
)
def test_an_order_that_was_changed_within_an_epoch_is_not_proved_and_the_next_one_is(
    accepted: str, changes: tuple[str, ...], finished: Path, small_shards: Path, tmp_path: Path
) -> None:
    run = begin_at(2, finished, tmp_path / "run")
    arguments = [*config_of(tmp_path, small_shards), *sets(*changes, "train.epochs=2")]
    assert train.main([*arguments, "--accept-changes", accepted]) == 0
    found = rows(run)
    assert [row["coverage/changed"] for row in found if "coverage/changed" in row] == [1]
    assert [row["coverage/ok"] for row in found if "coverage/ok" in row] == [1]
    log = (run / "log.txt").read_text()
    assert f"epoch 0: changed within ({', '.join(sorted(accepted.split(',')))}), so its images were not checked" in log
    for name in accepted.split(","):
        assert f"accepted: {name} was" in log  # in the log, and not on the terminal alone


def test_a_grown_set_is_accepted_within_an_epoch(finished: Path, tmp_path: Path) -> None:
    make_shards(Job(write_images(tmp_path / "images", GROWN), tmp_path / "shards", Options()), workers=1)
    run = begin_at(2, finished, tmp_path / "run")
    assert train.main([*config_of(tmp_path, tmp_path / "shards"), "--accept-changes", "manifest"]) == 0
    assert "epoch 0: changed within (manifest), so its images were not checked" in (run / "log.txt").read_text()
    assert [row["coverage/ok"] for row in rows(run) if "coverage/ok" in row] == [1]


def test_a_kill_after_the_change_keeps_the_mark(finished: Path, small_shards: Path, tmp_path: Path) -> None:
    run = begin_at(2, finished, tmp_path / "run")
    arguments = [*config_of(tmp_path, small_shards), *sets("run.seed=5")]
    assert train.main([*arguments, *sets("train.stop_at_step=3"), "--accept-changes", "seed"]) == 0
    assert progress_of(run)["changed"] == ["seed"]
    assert train.main(arguments) == 0
    assert "epoch 0: changed within (seed), so its images were not checked" in (run / "log.txt").read_text()
    assert progress_of(run)["changed"] == []


@pytest.mark.parametrize("change", ["evaluate.metric=macro_f1", "data.eval_split=train", "data.eval_size=48"])
def test_the_best_of_another_measure_is_not_compared(
    change: str, finished: Path, small_shards: Path, tmp_path: Path
) -> None:
    run = begin_at(4, finished, tmp_path / "run")
    newest = max((run / "checkpoints").glob("step-*"))
    edit_progress(newest, lambda progress: progress.update(best_value=1.5))  # no value of another measure is better
    assert train.main([*config_of(tmp_path, small_shards), *sets(change)]) == 0
    assert progress_of(run)["best_step"] == 8
    log = (run / "log.txt").read_text()
    assert "the best model starts again: it had 150.00% in accuracy on val" in log
    assert f"changed: {change.partition('=')[0]} was" in log


def test_a_checkpoint_without_its_measure_has_that_of_its_settings(
    finished: Path, small_shards: Path, tmp_path: Path
) -> None:
    run = begin_at(4, finished, tmp_path / "run")
    measured_in = progress_of(run)["best_in"]
    edit_progress(max((run / "checkpoints").glob("step-*")), lambda progress: progress.pop("best_in"))
    assert train.main(config_of(tmp_path, small_shards)) == 0
    assert progress_of(run)["best_in"] == measured_in
    assert "the best model starts again" not in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        ("optimizer.lr=0.5",),
        ("augment.mixup=0.2",),
        ("train.epochs=1",),
        ("evaluate.metric=macro_f1",),
        ("data.eval_split=train", "optimizer.lr=0.5"),
    ],
)
def test_a_finished_run_is_not_started_with_other_settings_and_keeps_its_records(
    changes: tuple[str, ...], finished: Path, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin_at(99, finished, tmp_path / "run")
    before = content(run)
    assert train.main([*config_of(tmp_path, small_shards), *sets(*changes)]) == 2
    message = capsys.readouterr().err
    assert "is finished at step 8, and this start differs" in message
    assert all(change.partition("=")[0] in message for change in changes)
    assert f"wasteddp train --from {run}" in message
    assert content(run) == before


def test_a_finished_run_is_not_started_with_another_order_either(
    finished: Path, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin_at(99, finished, tmp_path / "run")
    before = content(run)
    arguments = [*config_of(tmp_path, small_shards), "--accept-changes", "seed"]
    assert train.main([*arguments, *sets("run.seed=5")]) == 2
    message = capsys.readouterr().err
    assert "seed was 0 and is 5" in message
    assert content(run) == before


def test_a_finished_run_that_is_only_watched_otherwise_is_finished_and_keeps_its_records(
    finished: Path, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin_at(99, finished, tmp_path / "run")
    before = content(run)
    more = sets("data.workers=1", "checkpoint.keep_last=1", "track.tags=[again]")
    assert train.main([*config_of(tmp_path, small_shards), *more]) == 0
    assert "finished at step 8" in capsys.readouterr().out
    assert content(run) == before


def test_lost_metrics_are_reported_and_the_run_continues(finished: Path, small_shards: Path, tmp_path: Path) -> None:
    run = begin_at(4, finished, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert train.main(config_of(tmp_path, small_shards)) == 0
    assert "metrics.jsonl is missing: the rows up to step 4 are lost" in (run / "log.txt").read_text()
    assert [row["step"] for row in rows(run)] == [5, 6, 7, 8]


def test_a_finished_run_that_was_killed_before_its_records_gets_them(
    finished: Path, small_shards: Path, tmp_path: Path
) -> None:
    """A kill after the last checkpoint: nothing is left to train, but the exit code was not written."""
    run = begin_at(99, finished, tmp_path / "run")
    label = json.loads((run / "tracking.json").read_text()) | {"exit_code": None}
    (run / "tracking.json").write_text(json.dumps(label))
    assert train.main(config_of(tmp_path, small_shards)) == 0
    assert json.loads((run / "tracking.json").read_text())["exit_code"] == 0
    assert "report: " in (run / "log.txt").read_text().splitlines()[-1]
    assert [row["step"] for row in rows(run)] == list(range(1, 9))
