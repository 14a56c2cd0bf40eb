"""`wasteddp plan`: what a training would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from wasteddp import cli


def test_it_prints_steps_shuffle_and_what_nodes_fetch(small_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(small_shards), "--set", "train.batch_size=12", "--nodes", "1,2,5"]) == 0
    said = capsys.readouterr().out
    assert "50 train samples in " in said
    assert "4 steps an epoch of 12, 360 in 90 epochs; each epoch leaves out 2, different ones each time" in said
    assert "order: blocks of 1, window 0, 12 lanes; judged by its classes, a batch of 12 is worth 1" in said
    first, second, fifth = said.splitlines()[-3:]
    assert first.split()[2] == "1.00"
    assert float(second.split()[2]) > 1
    assert fifth == "    5  not possible: 12 lanes"


def test_a_config_is_taken_and_a_mistake_is_one_message(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("train: {batch_size: 10, epochs: 2}\ndata: {block: 5, window: 5}\n")
    assert cli.main(["plan", str(small_shards), "--config", str(config)]) == 0
    assert "5 steps an epoch of 10, 10 in 2 epochs" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(small_shards), "--set", "train.batch_size=64"])
    assert ended.value.code == 2
    assert "50 samples and train.batch_size is 64" in capsys.readouterr().err
