"""The messages of a run: a row of metrics as a line, and commands to copy at the end."""

from __future__ import annotations

import shlex

import pytest

from wasteddp.cli import parser
from wasteddp.data.manifest import Split
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.checkpoint.reader import Lineage
from wasteddp.training.messages import closing, progress_line, without_images

LINEAGE = Lineage("0" * 64, ("glass", "metal"), "resnet18", 0, 12, 12, 1, 0, "train", 32, "sgd")
ROW = {
    "epoch": 1.5,
    "train/loss": 1.25,
    "lr": 0.1,
    "train/images_per_s": 450.0,
    "train/wait_fraction": 0.012,
    "train/step_ms": 2000.0,
    "memory/peak_mb": 1834.2,
}


def test_a_row_in_words_has_the_figures_the_memory_and_the_time_left() -> None:
    line = progress_line(30, 120, ROW, better=False)
    for part in (
        "step 30/120",
        "epoch 1.50",
        "loss 1.2500",
        "450.0 images/s",
        "waiting for data 1.2%",
        "1834 MB",
        "3 min left",
    ):
        assert part in line
    assert "left" not in progress_line(120, 120, ROW, better=False)
    assert "GIL" not in progress_line(30, 120, ROW | {"train/starved_fraction": 0.05}, better=False)
    starved = progress_line(30, 120, ROW | {"train/starved_fraction": 0.63}, better=False)
    assert "waiting for data 1.2%  waiting for a core or the GIL 63% of the forward pass" in starved
    evaluated = {"val/loss": 1.0, "val/accuracy": 0.5, "val/macro_recall": 0.4, "val/samples": 327, "val/seconds": 0.6}
    assert progress_line(30, 120, ROW | evaluated, better=True).endswith("best so far")


def test_a_split_that_lacks_classes_is_reported() -> None:
    classes = ("glass", "metal ", "paper")
    [line] = without_images(classes, Split("val", (), (2, 0, 1)))
    assert line == "val has no images of 'metal ': macro figures are of 2 of 3 classes"
    assert without_images(classes, Split("val", (), (2, 1, 1))) == []


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("train", "val")])
def test_the_commands_of_the_closing_words_can_be_copied_whatever_the_path(splits: tuple[str, ...]) -> None:
    progress = Progress(LINEAGE, step=120, best_value=0.75, best_step=90)
    said = closing("runs/my first run", progress, 0, "", metric="accuracy", eval_split="val", splits=splits)
    assert said.startswith(
        "finished at step 120: best accuracy 75.00% at step 90; the model is in runs/my first run/model"
    )
    commands = [line.split(":  ", 1)[1].strip() for line in said.splitlines()[1:]]
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "wasteddp"
        assert "runs/my first run" in words
        parser().parse_args(words[1:])
    assert commands[0].endswith(f"--split {splits[-1]}")


def test_a_stopped_run_names_the_command_that_goes_on() -> None:
    said = closing(
        "runs/a", Progress(LINEAGE, step=7), 75, "SIGTERM", metric="accuracy", eval_split="val", splits=("train", "val")
    )
    assert said == "stopped by SIGTERM at step 7 and saved; run the same command again to resume (exit code 75)"
