"""The progress display of a run: two lines that fit the terminal, with messages above them."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from wasteddp.training.tracking.tracker import Display, figures

ROW = {
    "train/loss": 1.43211,
    "val/loss": 1.31882,
    "val/accuracy": 0.48933,
    "train/images_per_s": 1453.21,
    "train/wait_fraction": 0.0123,
    "memory/peak_mb": 18322.5,
    "lr": 0.1,
}


def test_the_figures_of_a_row_fit_into_80_columns() -> None:
    assert list(figures(ROW).values()) == [
        "loss 1.432", "val 1.319", "accuracy 48.9%", "1453 images/s", "waiting 1.2%", "18322 MB"
    ]  # fmt: skip
    assert len("  ".join(figures(ROW).values())) <= 80
    assert figures({"lr": 0.1}) == {}


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_step_time_left_and_figures_and_scrolls_the_messages(width: int) -> None:
    screen = io.StringIO()
    display = Display(Console(file=screen, force_terminal=True, width=width), total_steps=770, done=0)
    display.advance(385, "epoch 7.0")
    display.update(ROW)
    display.update({"train/loss": 1.1})
    display.print("a [bold]name[/bold] of 100 % " + "and more " * 30)
    display.print("a block keeps its lines\n" + "x" * 200)
    display.close()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    assert any("epoch 7.0" in line and "385/770" in line and "left" in line for line in lines)
    assert any(line.startswith("loss 1.100  val 1.319  accuracy 48.9%") for line in lines)
    assert any("a [bold]name[/bold] of 100 %" in line for line in lines)
    assert all(len(line) <= width for line in lines if "xxx" not in line)
    assert "x" * 200 in lines
