"""A loss that is NaN or far too large: what is skipped, undone or reported, and that a resumed run does the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from trainings import config_of, final_weights, rows

from wasteddp import train
from wasteddp.data.augmentation.augment import Augment
from wasteddp.errors import DivergedError
from wasteddp.settings import Optimizer, parse
from wasteddp.training import optimizers
from wasteddp.training.checkpoint.progress import Lineage, Progress
from wasteddp.training.distributed import startup
from wasteddp.training.divergence import Guard, RollbackRequest

LINEAGE = Lineage("0", ("a", "b"), "resnet18", 0, 4, 4, 1, 0, "train", 32, "sgd")
Poison = tuple[int, int, float]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[Poison]:
    """(epoch, sample, rate): images of that sample are NaN in that epoch, from that learning rate on."""
    poisons: list[Poison] = []
    real, real_rate, rates = Augment.__call__, optimizers.set_learning_rate, [0.0]

    def poisoned(self: Augment, images_BCHW: torch.Tensor, samples: Any, epoch: int) -> torch.Tensor:
        views = real(self, images_BCHW, samples, epoch)
        hit = any(e == epoch and (s in samples or s < 0) and rates[0] >= rate for e, s, rate in poisons)
        return views * float("nan") if hit else views

    def noted(optimizer: torch.optim.Optimizer, rate: float) -> None:
        rates[0] = rate
        real_rate(optimizer, rate)

    monkeypatch.setattr(Augment, "__call__", poisoned)
    monkeypatch.setattr(optimizers, "set_learning_rate", noted)
    return poisons


def run(folder: Path, shards: Path, *settings: str) -> int:
    return train.main([*config_of(folder, shards), *(part for setting in settings for part in ("--set", setting))])


def continued(folder: Path, run_folder: Path, step: int) -> Path:
    """Return a copy of a run as it was after `step`."""
    (folder / "run" / "checkpoints").mkdir(parents=True)
    name = f"step-{step:08d}"
    shutil.copytree(run_folder / "checkpoints" / name, folder / "run" / "checkpoints" / name)
    shutil.copy(run_folder / "metrics.jsonl", folder / "run")
    return folder / "run"


def progress_of(run_folder: Path) -> dict[str, Any]:
    newest = sorted((run_folder / "checkpoints").glob("step-*"))[-1]
    return dict(json.loads((newest / "progress.json").read_text()))


def test_a_poisoned_step_is_skipped_counted_and_leaves_no_trace(
    small_shards: Path, tmp_path: Path, poison: list[Poison]
) -> None:
    poison.append((0, 7, 0.0))
    keeps = ("train.on_divergence=skip", "checkpoint.keep_last=9")
    assert run(tmp_path, small_shards, *keeps) == 0
    found = rows(tmp_path / "run")
    missing = [row["step"] for row in found if "train/loss" not in row]
    assert len(missing) == 1
    assert missing[0] <= 4
    assert found[-1]["train/skipped"] == 1
    assert "none (all steps were skipped)" in (tmp_path / "run" / "log.txt").read_text()
    # the skipped step does not change the weights
    before, after = missing[0] - 1, missing[0]
    if before:
        then = [
            tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors" for step in (before, after)
        ]
        assert then[0].read_bytes() == then[1].read_bytes()
    # a run resumed before the poisoned step skips it again and ends with the same weights
    (tmp_path / "again").mkdir()
    again = continued(tmp_path / "again", tmp_path / "run", max(1, before))
    assert run(tmp_path / "again", small_shards, *keeps) == 0
    assert final_weights(again) == final_weights(tmp_path / "run")
    assert progress_of(again)["skipped"] == progress_of(tmp_path / "run")["skipped"] == 1


def test_too_many_skipped_steps_in_a_row_stop_the_run(
    small_shards: Path, tmp_path: Path, poison: list[Poison], capsys: pytest.CaptureFixture[str]
) -> None:
    poison.append((1, -1, 0.0))
    assert run(tmp_path, small_shards, "train.on_divergence=skip", "train.max_skipped_in_a_row=3") == 2
    assert "3 steps in a row were skipped, 3 in all (train.max_skipped_in_a_row)" in capsys.readouterr().err


def test_a_diverging_run_goes_back_and_on_with_a_smaller_rate(
    small_shards: Path, tmp_path: Path, poison: list[Poison], capsys: pytest.CaptureFixture[str]
) -> None:
    poison.append((1, -1, 0.006))
    keeps = ("train.on_divergence=rollback", "checkpoint.keep_last=9", "schedule.name=constant")
    assert run(tmp_path, small_shards, *keeps) == 0
    assert "rolling back to step 4 with 0.5 of the learning rate (rollback 1 of at most 3)" in capsys.readouterr().out
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, 9))
    assert [row["lr"] for row in found] == [0.01] * 4 + [0.005] * 4
    assert (found[-1]["train/rollbacks"], progress_of(tmp_path / "run")["lr_factor"]) == (1, 0.5)
    (tmp_path / "again").mkdir()
    again = continued(tmp_path / "again", tmp_path / "run", 6)
    assert run(tmp_path / "again", small_shards, *keeps) == 0
    assert final_weights(again) == final_weights(tmp_path / "run")


def test_a_run_that_always_diverges_stops_after_so_many_returns(
    small_shards: Path, tmp_path: Path, poison: list[Poison], capsys: pytest.CaptureFixture[str]
) -> None:
    poison.append((1, -1, 0.0))
    assert run(tmp_path, small_shards, "train.on_divergence=rollback", "train.max_rollbacks=2") == 2
    said = capsys.readouterr()
    assert "the mean loss since the last row of metrics is nan, after 2 rollbacks" in said.err
    assert "rolling back to step 4" in said.out
    assert "rolling back to step 3" in said.out  # the checkpoint from which it diverged again is removed
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))[-1] == "step-00000004"


def test_a_loss_far_above_a_guess_has_exploded(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, small_shards, "train.exploding_loss=0.5") == 2
    said = capsys.readouterr().err
    assert "above 0.5493 (train.exploding_loss 0.5 x ln K)" in said
    assert "or set train.on_divergence to rollback" in said


@pytest.mark.parametrize("name", get_args(Optimizer.model_fields["name"].annotation))
def test_a_skipped_step_changes_neither_weights_nor_state_nor_statistics(name: str) -> None:
    settings = parse(f"optimizer: {{name: {name}}}\ntrain: {{batch_size: 4, on_divergence: skip}}\nrun: {{threads: 1}}")
    runtime = startup.start_runtime(settings)

    def trained(batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        optimizer = optimizers.build(model, settings.optimizer)
        guard = Guard(settings, runtime, model, optimizer, num_classes=2, progress=Progress(LINEAGE))
        scheduled = optimizers.ScheduledOptimizer(
            model,
            optimizer,
            optimizer,
            runtime=runtime,
            settings=settings.optimizer,
            rates=settings.schedule,
            model=settings.model,
            epochs=1,
            steps_per_epoch=9,
        )
        for batch in batches:
            guard.begin_step()
            loss = model(batch).square().mean()
            loss.backward()
            guard.step(scheduled, loss.detach(), needs_norm=False)
            optimizer.zero_grad()
        state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
        return state | optimizers.state_tensors(optimizer, model)

    good = list(torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1)))
    bad = torch.full((4, 3), float("nan"))
    clean, poisoned = trained(good), trained([bad, good[0], bad, good[1], good[2], bad])
    assert clean.keys() == poisoned.keys()
    assert all(torch.equal(clean[key], poisoned[key]) for key in clean)


def test_weights_that_are_not_finite_are_never_saved() -> None:
    settings = parse("train: {batch_size: 4, on_divergence: rollback, max_rollbacks: 1}\nrun: {threads: 1}")
    runtime, model = startup.start_runtime(settings), nn.Linear(3, 2)
    guard = Guard(
        settings, runtime, model, optimizers.build(model, settings.optimizer), num_classes=2, progress=Progress(LINEAGE)
    )
    row = {"train/loss": 0.5, "train/grad_norm": 1.0}
    assert guard.check(Progress(LINEAGE), dict(row), saves=True) == Progress(LINEAGE)
    with torch.no_grad():
        model.weight[0, 0] = 1e30  # finite, but the next step would overflow
    with pytest.raises(RollbackRequest, match="the weights are as large as 1e\\+30 after this step"):
        guard.check(Progress(LINEAGE), dict(row), saves=True)
    with torch.no_grad():
        model.weight[0, 1] = float("nan")
    with pytest.raises(RollbackRequest, match="the mean loss since the last row of metrics is nan"):
        guard.check(Progress(LINEAGE), row | {"train/loss": float("nan")}, saves=True)  # the loss is reported first
    with pytest.raises(RollbackRequest, match="the weights are not finite"):
        guard.check(Progress(LINEAGE), dict(row), saves=True)
    with pytest.raises(DivergedError, match="after 1 rollbacks"):
        guard.check(replace(Progress(LINEAGE), rollbacks=1), dict(row), saves=True)
