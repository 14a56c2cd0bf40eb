"""The mean of a run's checkpoints: equal to a plain sum, with its own statistics, in a separate model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from kept import save, states_of
from reported_run import sorted_items
from safetensors.torch import load_file
from small_run import CARD
from torch import nn
from trainings import config_of

from wasteddp import train
from wasteddp.cli import main
from wasteddp.decisions.calibration import calibrate, scaled
from wasteddp.errors import CheckpointError
from wasteddp.files import RunLock
from wasteddp.inference.bundle import Averaged, load_bundle
from wasteddp.model.networks import build, estimate_statistics
from wasteddp.tools import average
from wasteddp.tools.average import mean_of_newest

IMAGES = 20  # for the statistics: two batches of 8 and a remainder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    """A run of 4 steps with all its checkpoints. It evaluates at another size than it trains at."""
    folder = tmp_path_factory.mktemp("finished")
    more = ("train.epochs=1", "checkpoint.keep_last=9", "data.eval_size=40")
    assert train.main([*config_of(folder, small_shards), *(part for o in more for part in ("--set", o))]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def model_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["average", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_mean_is_that_of_a_plain_sum_over_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 5)
    mean = mean_of_newest(tmp_path, 3, print)
    assert mean.steps == (2, 3, 5)
    expected = sum(states_of(step)["model"]["conv.weight"] for step in (2, 3, 5)) / 3
    assert torch.allclose(mean.weights["conv.weight"], expected)
    assert mean.weights["conv.weight"].dtype == torch.float32
    assert mean.weights["bn.num_batches_tracked"] == 5
    assert mean.moving == {"bn"}
    assert mean.progress.step == 5
    assert mean_of_newest(tmp_path, 9, print).steps == (1, 2, 3, 5)


def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"cut")
    said: list[str] = []
    assert mean_of_newest(tmp_path, 2, said.append).steps == (1, 2)
    assert len(said) == 1
    assert "step-00000003" in said[0]


@pytest.mark.parametrize(
    ("steps", "found"), [((), "holds 0 intact checkpoints"), ((4,), "holds 1 intact checkpoint\n")]
)
def test_fewer_than_two_are_refused(tmp_path: Path, steps: tuple[int, ...], found: str) -> None:
    save(tmp_path, *steps)
    with pytest.raises(CheckpointError) as caught:
        mean_of_newest(tmp_path, 5, print)
    assert found in str(caught.value)
    assert "checkpoint.keep_last: 5" in caught.value.remedy


def test_statistics_are_the_means_of_the_batches_own_and_frozen_ones_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    batches = list(torch.randn(3, 5, 3, 6, 6))
    estimate_statistics(model, batches, {"1"})
    inner = [model[0](batch).detach() for batch in batches]
    mean = torch.stack([x.mean((0, 2, 3)) for x in inner]).mean(0)
    variance = torch.stack([x.var((0, 2, 3), unbiased=True) for x in inner]).mean(0)
    assert torch.allclose(model[1].running_mean, mean, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(model[1].running_var, variance, atol=1e-6)  # type: ignore[arg-type]
    assert torch.equal(model[4].running_mean, torch.zeros(2))  # type: ignore[arg-type]
    assert not any(module.training for module in model.modules())


def test_an_average_is_a_model_of_its_own_that_is_evaluated_like_a_run(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_bundle(copied)[0]
    assert main(["average", str(copied), "--last", "3", "--images", str(IMAGES), "--batch-size", "8"]) == 0
    said = capsys.readouterr().out
    assert "mean of the checkpoints of steps 2, 3, 4" in said
    assert "of 16 training images, centre views of 40 px" in said
    reason = "(too few|calibrate on more images)"  # there are 13
    assert re.search(rf"not calibrated: .*{reason}.*, then: wasteddp calibrate .*/average\n", said)
    assert load_bundle(copied)[0] == before, "the run's own model stays"

    folder = copied / "average"
    card, state = load_bundle(folder)
    assert card.averaged == Averaged(steps=(2, 3, 4))
    assert (card.trained.step, card.trained.epoch) == (4, 0)
    assert card.preprocessing == before.preprocessing
    assert card.hashes.manifest == before.hashes.manifest
    expected = sum(model_of(copied, step)["layer1.0.conv1.weight"].double() for step in (2, 3, 4)) / 3
    assert torch.allclose(state["layer1.0.conv1.weight"].double(), expected, atol=1e-7)
    by_average = json.loads((folder / "evaluations" / "val" / "metrics.json").read_text())
    assert by_average["accuracy"] == card.trained.value
    assert by_average["hashes"]["weights"] == card.hashes.weights
    assert main(["evaluate", str(folder), "--split", "val", "--batch-size", "8"]) == 0
    evaluated = json.loads((folder / "evaluations" / "val" / "metrics.json").read_text())
    assert evaluated == by_average


def test_an_average_is_calibrated_where_its_evaluation_has_enough_images(tmp_path: Path) -> None:
    labels, shares = sorted_items(0, 400)
    shares = scaled(shares, 0.4).astype(np.float32)  # too sure
    seen = SimpleNamespace(split="val")
    found = SimpleNamespace(labels=labels, probabilities_NK=shares, seen=seen, groups=None)
    card, line = average._calibrated(CARD, found, tmp_path)  # type: ignore[arg-type]
    expected = calibrate(labels, shares, split="val")
    assert (card.temperature, card.calibration) == (expected.temperature, expected.to_json())
    assert card.temperature > 1.5
    assert line.startswith(f"temperature {card.temperature:.3f}, from 400 images of val")


def test_its_statistics_are_of_the_first_training_images_as_an_evaluation_sees_them(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    real = average.estimate_statistics

    def noted(model: nn.Module, batches: Iterator[torch.Tensor], names: Any) -> None:
        def kept() -> Iterator[torch.Tensor]:
            for batch in batches:
                seen.append(batch)
                yield batch

        real(model, kept(), names)

    monkeypatch.setattr(average, "estimate_statistics", noted)
    assert main(["average", str(copied), "--images", str(IMAGES)]) == 0
    assert [tuple(batch.shape) for batch in seen] == [(8, 3, 40, 40)] * 2
    _, state = load_bundle(copied / "average")
    model = build("resnet18", 3)
    model.load_state_dict(state)
    convolved = [model.conv1(batch).detach() for batch in seen]
    assert torch.allclose(state["bn1.running_mean"], torch.cat(convolved).mean((0, 2, 3)), atol=1e-4)


def test_a_run_that_keeps_one_checkpoint_gets_the_setting_to_change(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        shutil.rmtree(copied / "checkpoints" / f"step-{step:08d}")
    said = refused(capsys, str(copied))
    assert "holds 1 intact checkpoint" in said
    assert "checkpoint.keep_last: 5" in said
    assert not (copied / "average").exists()


def test_the_folder_of_a_run_is_no_place_for_an_average(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is the folder of a run" in refused(capsys, str(copied), "--out", str(copied))
    assert not (copied / "model.json").exists()


def test_an_average_takes_the_place_of_the_runs_model_only_when_asked(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = RunLock(copied / "checkpoints", print)
    assert "is being written by process" in refused(capsys, str(copied), "--replace")
    assert load_bundle(copied)[0].averaged == Averaged()
    claim.release()
    assert main(["average", str(copied), "--replace"]) == 0
    card, _ = load_bundle(copied)
    assert card.averaged == Averaged(steps=(1, 2, 3, 4))
    record = json.loads((copied / "evaluations" / "val" / "metrics.json").read_text())
    assert record["hashes"]["weights"] == card.hashes.weights
    assert not (copied / "average").exists()
    capsys.readouterr()
    assert main(["report", str(copied)]) == 0
    assert "mean of the checkpoints of steps 1, 2, 3, 4" in (copied / "report.html").read_text()
