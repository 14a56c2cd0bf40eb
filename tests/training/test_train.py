"""The program in one process: the files it writes, a kill and resume, and the messages of errors."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from small_run import write_images
from trainings import config_of, final_weights, launch, rows, run_ranks, start_ranks

from wasteddp import cli, train
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.inference.bundle import load_bundle
from wasteddp.sharding.build import Job, Options, make_shards


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    """A finished run, launched from another directory without the package on the path."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = launch(["--report", *config_of(folder, small_shards)], cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_leaves_its_folder(undisturbed: Path) -> None:
    assert {path.name for path in undisturbed.iterdir()} == {
        "settings.yaml", "environment.json", "tracking.json", "metrics.jsonl", "log.txt", "checkpoints", "model",
        "evaluations", "report.html",
    }  # fmt: skip
    found = rows(undisturbed)
    assert [row["step"] for row in found] == list(range(1, 9))
    assert [row["step"] for row in found if "val/accuracy" in row] == [4, 8]
    assert {row["val/samples"] for row in found if "val/accuracy" in row} == {13}
    assert all(np.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0 for row in found)
    log = (undisturbed / "log.txt").read_text()
    for fact in ("1 x cpu", "fp32 (as set)", "1 processes x 6 images x 2 accumulated", "50 training and 13 val images"):
        assert fact in log
    assert "finished at step 8" in log
    assert f"report: {undisturbed}/report.html" in log
    assert "hostname" not in (undisturbed / "environment.json").read_text()
    assert found[-1]["checkpoint/seconds"] > 0


def test_the_bundle_is_the_best_checkpoint_and_answers(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card, state = load_bundle(undisturbed)
    best = load_file(undisturbed / "checkpoints" / f"step-{card.trained.step:08d}" / "model.safetensors")
    assert state.keys() == best.keys()
    assert all((state[name] == best[name]).all() for name in best)
    assert card.classes == ("glass", "metal", "paper")
    assert cli.main(["evaluate", str(undisturbed), "--split", "test"]) == 0
    metrics = json.loads((undisturbed / "evaluations" / "test" / "metrics.json").read_text())
    shutil.rmtree(undisturbed / "evaluations" / "test")
    assert metrics["num_samples"] == 10
    assert "10" in capsys.readouterr().out


def test_what_the_best_model_was_measured_at_is_what_an_evaluation_finds(undisturbed: Path) -> None:
    path = undisturbed / "evaluations" / "val" / "metrics.json"
    by_training = json.loads(path.read_text())
    assert by_training["options"]["by"] == "training"
    assert sorted(file.name for file in path.parent.iterdir()) == ["confusion.csv", "metrics.json"]
    best = next(row for row in rows(undisturbed) if row["step"] == by_training["model"]["trained"]["step"])
    assert by_training["accuracy"] == best["val/accuracy"] == best["best/value"]
    assert cli.main(["evaluate", str(undisturbed), "--split", "val", "--batch-size", "8"]) == 0
    evaluated = json.loads(path.read_text())
    for name in ("hashes", "classes", "confusion", "per_class", "accuracy_low", "macro_f1"):
        assert by_training[name] == evaluated[name]
    for name in ("surest_mistakes", "worst_mistakes"):
        for one, other in zip(by_training[name], evaluated[name], strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    for one, other in zip(by_training["reliability"]["bins"], evaluated["reliability"]["bins"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_kill_9_in_the_middle_of_an_epoch_costs_nothing(undisturbed: Path, small_shards: Path, tmp_path: Path) -> None:
    arguments = config_of(tmp_path, small_shards)
    [process] = start_ranks(arguments, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/8"):  # printed before the save of step 3, and after that of step 1 is on disk
                process.kill()
    left = [row["step"] for row in rows(tmp_path / "run")]
    assert left[-1] < 8, "the run had ended before it was killed"
    done = run_ranks(arguments)
    assert done.returncode == 0, done.stderr
    assert "attempt 2" in done.stdout
    assert final_weights(tmp_path / "run") == final_weights(undisturbed)
    for ours, theirs in zip(rows(tmp_path / "run"), rows(undisturbed), strict=True):
        for name in ("step", "lr", "train/loss", "train/grad_norm"):
            assert ours[name] == theirs[name]
    assert (tmp_path / "run" / "model" / "model.json").exists()


def test_a_signal_saves_and_the_message_has_the_way_to_go_on(
    undisturbed: Path, small_shards: Path, tmp_path: Path
) -> None:
    arguments = [*config_of(tmp_path, small_shards), "--set", "checkpoint.every_steps=0"]
    [process] = start_ranks(["--report", *arguments], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("step 2/8"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 75
    assert (tmp_path / "run" / "RESUMABLE").exists()
    assert "stopped by SIGTERM at step" in said
    assert "by a signal, and saved" in (tmp_path / "run" / "report.html").read_text()
    assert run_ranks(arguments).returncode == 0
    assert not (tmp_path / "run" / "RESUMABLE").exists()
    assert final_weights(tmp_path / "run") == final_weights(undisturbed)


def test_a_finished_run_started_again_does_nothing(undisturbed: Path) -> None:
    before = final_weights(undisturbed)
    settings = undisturbed / "settings.yaml"
    began = time.time()
    assert train.main(["--config", str(settings)]) == 0
    assert final_weights(undisturbed) == before
    assert all(path.stat().st_mtime < began for path in (undisturbed / "checkpoints").rglob("model.safetensors"))


def test_a_check_after_a_killed_check_still_checks(
    undisturbed: Path, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run.check")  # as left by a killed check
    assert train.main([*config_of(tmp_path, small_shards), "--check"]) == 0
    assert "step 1/1" in capsys.readouterr().out
    assert not (tmp_path / "run.check").exists()


def test_a_check_removes_its_files(small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*config_of(tmp_path, small_shards), "--check"]) == 0
    assert "checked: one step, one evaluation and one checkpoint succeeded" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_check_of_a_checkpoint_takes_one_step_further(
    undisturbed: Path, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, then in (("step-00000007", "step 8/8"), ("step-00000008", "step 9/9")):
        start = ["--check", "--resume", str(undisturbed / "checkpoints" / step)]
        assert train.main([*config_of(tmp_path, small_shards), *start]) == 0
        assert then in capsys.readouterr().out


def test_a_save_on_request_comes_at_the_next_step(small_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "SAVE_NOW").touch()
    more = ["--set", "checkpoint.every_steps=0", "--set", "checkpoint.keep_last=9", "--set", "train.epochs=1"]
    assert train.main([*config_of(tmp_path, small_shards), *more]) == 0
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-00000001", "step-00000004"]
    assert not (tmp_path / "run" / "SAVE_NOW").exists()


def test_another_seed_is_refused_or_accepted_by_name(
    undisturbed: Path, small_shards: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    arguments = [*config_of(tmp_path, small_shards), "--set", "train.epochs=3"]
    assert "seed was 0 and is 1" in refused(arguments, "run.seed=1")
    assert train.main([*arguments, "--set", "run.seed=1", "--accept-changes", "seed"]) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 13))
    # the checkpoints now have the new seed
    assert train.main([*arguments, "--set", "run.seed=1"]) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "optimizer.name=adamw",
            "model.freeze=layer2",
            "model.unfreeze_every_epochs=9",
            "train.class_weighting=effective_number",
        ],
        ["optimizer.clip_norm=1", "augment.erase=0.5", "augment.brightness=0.3", "train.label_smoothing=0.1"],
        ["precision=bf16", "schedule.name=step", "model.channels_last=false", "evaluate.every_steps=3"],
    ],
)
def test_other_settings_train_too(overrides: list[str], small_shards: Path, tmp_path: Path) -> None:
    more = [part for override in overrides for part in ("--set", override)]
    assert train.main([*config_of(tmp_path, small_shards), *more]) == 0
    assert rows(tmp_path / "run")[-1]["step"] == 8


def test_a_run_is_evaluated_and_used_at_a_size_of_its_own(small_shards: Path, tmp_path: Path) -> None:
    more = ["--set", "data.eval_size=40", "--set", "train.epochs=1"]
    assert train.main([*config_of(tmp_path, small_shards), *more]) == 0
    assert "3 classes, 32 px, evaluated at 40 px" in (tmp_path / "run" / "log.txt").read_text()
    card, _ = load_bundle(tmp_path / "run")
    assert (card.preprocessing.image_size_px, card.preprocessing.resize_px) == (40, 46)
    path = tmp_path / "run" / "evaluations" / "val" / "metrics.json"
    by_training = json.loads(path.read_text())
    assert cli.main(["evaluate", str(tmp_path / "run"), "--split", "val", "--batch-size", "8"]) == 0
    evaluated = json.loads(path.read_text())
    assert evaluated["confusion"] == by_training["confusion"]
    bins = [[one["mean_confidence"] for one in record["reliability"]["bins"]] for record in (evaluated, by_training)]
    assert bins[0] == pytest.approx(bins[1], abs=1e-4)


def test_early_stop_ends_the_run_and_stays_ended(small_shards: Path, tmp_path: Path) -> None:
    # with a learning rate near zero the first evaluation stays the best
    arguments = [*config_of(tmp_path, small_shards), "--set", "train.epochs=9", "--set", "train.early_stop_epochs=1"]
    arguments += ["--set", "optimizer.lr=1e-12", "--set", "evaluate.every_steps=1"]
    assert train.main(arguments) == 0
    assert "stopped early" in (tmp_path / "run" / "log.txt").read_text()
    ended_at = rows(tmp_path / "run")[-1]["step"]
    assert ended_at < 36
    assert train.main(arguments) == 0
    assert rows(tmp_path / "run")[-1]["step"] == ended_at


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def message(arguments: list[str], *overrides: str) -> str:
        capsys.readouterr()
        assert train.main([*arguments, *(part for o in overrides for part in ("--set", o))]) == 2
        return capsys.readouterr().err

    return message


def test_wrong_settings_are_one_message(small_shards: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    arguments = config_of(tmp_path, small_shards)
    assert "unknown key 'optimizer.rl'" in refused(arguments, "optimizer.rl=1")
    assert "optimizer.lr: found -1" in refused(arguments, "optimizer.lr=-1")
    assert "precision is fp16 and there is no GPU" in refused(arguments, "precision=fp16")
    assert "'resnet51' is not a classifier" in refused(arguments, "model.arch=resnet51")
    assert "has no samples in a split called 'dev'; its splits: " in refused(arguments, "data.eval_split=dev")
    assert "50 samples and train.batch_size is 64" in refused(arguments, "train.batch_size=64")
    assert "there is no folder /nowhere" in refused(arguments, "data.shards=/nowhere")
    assert not (tmp_path / "run").exists()


def test_a_split_that_is_trained_and_evaluated_on_is_refused(
    small_shards: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    manifest = Manifest.load(shards)
    split = manifest.splits["train"]
    replace(manifest, splits={**manifest.splits, "val": replace(split, name="val")}).save()
    found = refused(config_of(tmp_path, shards))
    assert f"{len(split.shards)} tar(s) are in both splits: train-000000.tar of split val is train-000000.tar" in found
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_missing_shard_is_one_message(small_shards: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    (shards / "train-000001.tar").unlink()
    assert "train-000001.tar cannot be opened: No such file or directory" in refused(config_of(tmp_path, shards))


def test_a_class_without_training_images_is_one_message(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = write_images(tmp_path / "images", {"train": (12, 12, 0), "val": (3, 3, 3)})
    make_shards(Job(source, tmp_path / "shards", Options()), workers=1)
    assert "has no image of paper" in refused(config_of(tmp_path, tmp_path / "shards"))


def test_one_class_only_is_one_message(tmp_path: Path, small_shards: Path, refused: Callable[..., str]) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["classes"] = ["glass"]
    for split in manifest["splits"].values():
        split["samples_per_class"] = [sum(split["samples_per_class"])]
    (shards / "manifest.json").write_text(json.dumps(manifest))
    assert "has fewer than two classes: glass" in refused(config_of(tmp_path, shards))


def test_other_classes_than_the_checkpoints_are_one_message(
    undisturbed: Path, small_shards: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    manifest = shards / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"glass"', '"bottles"'))
    said = refused(config_of(tmp_path, shards))
    assert "belongs to another run: manifest was" in said
    assert "classes was ('glass', 'metal', 'paper') and is ('bottles', 'metal', 'paper')" in said


def test_a_damaged_training_image_stops_the_run_unless_allowed(
    small_shards: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    manifest = Manifest.load(shards)
    with SplitReader(manifest, "train") as reader:
        offset = int(reader._index[2]["offset"])
    with (shards / manifest.split("train").shards[0].tar).open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 64)
    arguments = config_of(tmp_path, shards)
    said = refused(arguments)
    assert "1 training samples could not be used, data.max_damaged is 0" in said
    assert "train-000000.tar, sample 2" in said
    assert train.main([*arguments, "--set", "data.max_damaged=5"]) == 0
    assert 1 <= rows(tmp_path / "run")[-1]["train/damaged"] <= 2
    assert "damaged: " in (tmp_path / "run" / "log.txt").read_text()


def test_a_folder_that_cannot_be_written_is_one_message(
    small_shards: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("")
    said = refused(config_of(tmp_path, small_shards), f"run.out={tmp_path / 'file' / 'run'}")
    assert "Not a directory" in said
    assert "name another folder" in said


def test_no_permission_is_one_message(
    small_shards: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.mkdir

    def denied(self: Path, *rest: object, **how: object) -> None:
        if self.name == "checkpoints":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        real(self, *rest, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", denied)  # root may write everywhere, so a real folder would not refuse
    said = refused(config_of(tmp_path, small_shards))
    assert "making the checkpoints' folder: Permission denied" in said
    assert "give yourself write permission" in said


def test_a_full_disk_is_one_message(
    small_shards: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    assert "has 1 MB free; the checkpoints take" in refused(config_of(tmp_path, small_shards))


def test_a_diverged_loss_is_one_message_and_no_checkpoint(
    small_shards: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    # Rows are rare and checkpoints are not: each save checks for divergence first. The loss of the first step is fine,
    # and the weights after it overflow in the second.
    said = refused(config_of(tmp_path, small_shards), "optimizer.lr=1e30", "train.log_every_steps=100")
    assert re.search(r"error: training diverged: the weights are as large as \d.*e\+\d\d after this step", said)
    assert "lower optimizer.lr (now 1e+30)" in said
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        loss = next(row["train/loss"] for row in rows(tmp_path / "run") if row["step"] == int(path.name[5:]))
        assert np.isfinite(loss)
