"""`wasteddp folds` trains every fold, and sums up their evaluations: each image is counted once."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small_run import write_images
from trainings import CONFIG, PROGRAM

from wasteddp.cli import main
from wasteddp.data.manifest import Manifest
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.tools import cross_validation
from wasteddp.training.distributed import launcher

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def fold_set(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("folds")
    source = write_images(folder / "images", {"train": (16, 12, 10), "test": (3, 3, 3)})
    return make_shards(Job(source, folder / "set", Options(shard_mb=0.02, folds=3)), workers=1)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, fold_set: Manifest) -> list[str]:
    """The command line, in a folder where all folds are trained."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "config.yaml").write_text(CONFIG.replace("epochs: 2", "epochs: 1"))
    arguments = ["folds", "--config", str(folder / "config.yaml"), "--cpu"]
    arguments += ["--set", f"data.shards={fold_set.folder}", "--set", f"run.out={folder / 'cv'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "PROGRAM", PROGRAM)
        assert main(arguments) == 0
    return arguments


def out_of(command: list[str]) -> Path:
    return Path(command[-1].partition("=")[2])


@pytest.mark.slow
def test_each_image_is_evaluated_once_by_the_model_that_has_not_seen_it(
    command: list[str], fold_set: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    out = out_of(command)
    summary = json.loads((out / "folds.json").read_text())
    confusion = np.array(summary["pooled"]["confusion"])
    assert confusion.sum(axis=1).tolist() == [16, 12, 10]
    each = [json.loads((out / f"fold-{n}" / "evaluations" / "val" / "metrics.json").read_text()) for n in range(3)]
    assert np.array_equal(confusion, sum(np.array(one["confusion"]) for one in each))
    accuracies = [one["accuracy"] for one in each]
    assert summary["mean"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["standard_deviation"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    assert summary["pooled"]["accuracy"] == pytest.approx(np.trace(confusion) / 38)
    assert [one["num_samples"] for one in summary["folds"]] == [
        fold_set.splits[f"fold-{number}"].num_samples for number in range(3)
    ]
    assert summary["manifest"] == fold_set.sha256
    for fold in range(3):
        settings = (out / f"fold-{fold}" / "settings.yaml").read_text()
        assert f"fold: {fold}\n" in settings
    assert main([*command, "--sum-up"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "standard deviation" in printed
    assert "confusion: rows true, columns predicted" in printed
    assert "all folds together" in printed
    assert json.loads((out / "folds.json").read_text()) == summary
    assert [one["without_images"] for one in summary["folds"]] == [[], [], []]
    assert "has no images" not in printed
    summary["folds"][1]["without_images"] = ["rare ", "paper"]
    assert summary["groups"] is None
    summary["groups"] = {"rule": "column site", "num_groups": 7}
    cross_validation._print(Console(width=300), summary, out)
    printed = capsys.readouterr().out
    assert "of 7 groups (column site); the accuracy's interval is over images, so it is too narrow" in printed
    assert "fold 1 has no images of 'rare ', paper: its macro figures" in printed


def test_the_model_of_a_fold_is_evaluated_on_its_own_val_split(
    command: list[str], fold_set: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    run = out_of(command) / "fold-1"
    before = json.loads((run / "evaluations" / "val" / "metrics.json").read_text())["confusion"]
    assert main(["evaluate", str(run), "--split", "val", "--device", "cpu", "--workers", "1"]) == 0
    assert json.loads((run / "evaluations" / "val" / "metrics.json").read_text())["confusion"] == before
    assert main(["evaluate", str(run), "--split", "test", "--device", "cpu", "--workers", "1"]) == 0
    assert "test: 9 images" in " ".join(capsys.readouterr().out.split())


def test_another_fold_does_not_continue_a_run(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = out_of(command)
    arguments = [sys.executable, str(PROGRAM), *command[1:3], "--set", command[5], "--set", "data.fold=2"]
    done = subprocess.run(
        [*arguments, "--set", f"run.out={out / 'fold-1'}"], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 2
    assert "train_split was 'all folds but 1' and is 'all folds but 2'" in done.stderr


def test_a_fold_without_an_evaluation_or_with_two_runs_is_named(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "cv"
    subprocess.run(["cp", "-r", str(out_of(command)), str(copied)], check=True)
    elsewhere = [*command[:-1], f"run.out={copied}", "--sum-up"]
    subprocess.run(["cp", "-r", str(copied / "fold-1"), str(copied / "another")], check=True)
    with pytest.raises(SystemExit) as stopped:
        main(elsewhere)
    assert stopped.value.code == 2
    assert f"fold 1 of {copied} has 2 runs: " in capsys.readouterr().err
    subprocess.run(["rm", "-r", str(copied / "another"), str(copied / "fold-1" / "evaluations")], check=True)
    with pytest.raises(SystemExit):
        main(elsewhere)
    assert "fold 1 of" in capsys.readouterr().err


def test_an_evaluation_of_other_images_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "cv"
    subprocess.run(["cp", "-r", str(out_of(command)), str(copied)], check=True)
    path = copied / "fold-0" / "evaluations" / "val" / "metrics.json"
    record = json.loads(path.read_text())
    record["confusion"][0][0] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        main([*command[:-1], f"run.out={copied}", "--sum-up"])
    assert "is of other images than fold 0" in capsys.readouterr().err
    path.write_text('{"format": "wasteddp-evaluation", "format_version": 1}')
    with pytest.raises(SystemExit):
        main([*command[:-1], f"run.out={copied}", "--sum-up"])
    assert f"{path} is not the record of an evaluation: " in capsys.readouterr().err


def test_a_set_without_folds_is_refused(
    command: list[str], small_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--set", f"data.shards={small_shards}"])
    assert stopped.value.code == 2
    assert "has no folds" in capsys.readouterr().err


def test_the_commands_of_a_slurm_array_train_each_fold_and_sum_them_up(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "on a cluster"
    assert main([*command[:-1], f"run.out={out}", "--slurm"]) == 0
    array, after = capsys.readouterr().out.splitlines()
    words = shlex.split(array)
    assert words[:4] == [f"SWEEP={out / 'folds.txt'}", f"RUN_OUT={out}", "sbatch", "--array=1-3"]
    assert (out / "folds.txt").read_text() == "--set data.fold=0\n--set data.fold=1\n--set data.fold=2\n"
    assert not any("run.out" in word for word in words)  # slurm/train.sh gives each element a folder in RUN_OUT
    for fold in range(3):
        subprocess.run(["cp", "-r", str(out_of(command) / f"fold-{fold}"), str(out / str(fold + 1))], check=True)
    assert main(shlex.split(after, comments=True)[1:]) == 0
    assert json.loads((out / "folds.json").read_text())["pooled"]["num_samples"] == 38


def test_a_training_that_stops_ends_the_command_with_its_exit_code(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os, signal, sys, time\n"
                       "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
                       "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n")  # fmt: skip
    monkeypatch.setattr(launcher, "PROGRAM", program)
    handler = signal.getsignal(signal.SIGTERM)
    assert main([*command[:-1], f"run.out={tmp_path / 'cv'}"]) == 75
    assert "fold 0 did not finish: run the same command again" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is handler
