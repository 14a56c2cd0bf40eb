"""The moving average of the weights: equal to a plain loop, unchanged by a skipped step, and exported by a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from trainings import config_of, final_weights, rows

from wasteddp import cli, settings, train
from wasteddp.inference.bundle import Averaged, load_bundle
from wasteddp.model import ema
from wasteddp.model.ema import Ema, NoAverage, decay_at
from wasteddp.training.distributed import startup

DECAY = 0.5  # reached at step 8, so that a run of 8 steps has the warm-up and a little more


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2)]
    model: nn.Module = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def move(model: nn.Module, step: int) -> None:
    """Change the weights and BatchNorm's statistics as a training step does."""
    generator = torch.Generator().manual_seed(step)
    model.train()
    model(torch.randn(6, 3, 4, 4, generator=generator))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)


def plainly(states: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """Return the average of a network's states at the start and after each step, number by number in float64."""
    average = {name: tensor.double() for name, tensor in states[0].items()}
    for step, state in enumerate(states[1:]):
        d = min(decay, (1 + step) / (10 + step))
        average = {name: d * average[name] + (1 - d) * state[name].double() for name in average}
    return average


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_decay_grows_with_the_step_up_to_its_setting() -> None:
    assert [decay_at(step, 0.999) for step in (0, 8, 90)] == [1 / 10, 9 / 18, 91 / 100]
    assert decay_at(8990, 0.999) == 8991 / 9000 == 0.999
    assert decay_at(10**7, 0.999) == 0.999
    assert decay_at(8, 0.4) == 0.4


@pytest.mark.parametrize("may_skip", [False, True])
def test_the_average_is_that_of_a_plain_loop_with_its_statistics_and_count(may_skip: bool) -> None:
    model = network()
    average = Ema(model, DECAY)
    states = [copied(model)]
    for step in range(12):
        move(model, step)
        average.update(step, torch.tensor(False) if may_skip else None)
        states.append(copied(model))
    expected, found = plainly(states, DECAY), average.network.state_dict()
    assert found.keys() == expected.keys()
    assert int(found.pop("1.num_batches_tracked")) == 12
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), expected[name], atol=1e-6), name
        assert not torch.allclose(tensor, states[-1][name], atol=1e-3), "the weights are not an average"
    assert average.network[0].weight.stride() == model[0].weight.stride(), "channels-last kept"  # type: ignore[index]


def test_a_skipped_step_does_not_count() -> None:
    model = network()
    average = Ema(model, DECAY)
    move(model, 0)
    average.update(0, torch.tensor(False))
    before = copied(average.network)
    average.update(1, torch.tensor(True))
    after = average.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    average.update(2, torch.tensor(False))
    assert not torch.equal(before["0.weight"], average.network.state_dict()["0.weight"])


def test_a_network_without_counters_is_averaged_too() -> None:
    model = nn.Linear(2, 2)
    average = Ema(model, DECAY)
    average.update(0, None)
    assert torch.equal(average.network.state_dict()["weight"], model.weight)


def test_without_a_decay_the_network_itself_is_evaluated_and_nothing_is_kept() -> None:
    model, prepared = network(), nn.Sequential()
    average = ema.average_of(0.0, model, prepared)
    assert isinstance(average, NoAverage)
    assert average.network is prepared
    assert not average.states


def test_the_average_computes_in_the_precision_of_the_run_and_with_weights_of_its_own() -> None:
    runtime = startup.start_runtime(settings.parse("precision: bf16\nrun: {threads: 1}\ntrain: {batch_size: 4}"))
    model = network()
    prepared, _ = runtime.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    average = Ema(model, DECAY)
    images = torch.randn(4, 3, 4, 4)
    seen: list[torch.dtype] = []
    average.network[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))  # type: ignore[operator]
    with torch.no_grad():
        prepared.eval()
        assert torch.equal(average.network(images), prepared(images))
        move(model, 0)
        prepared.eval()
        assert not torch.allclose(average.network(images), prepared(images))
    assert seen == [torch.bfloat16] * 2
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert not average.network.training


# --- through the program ----------------------------------------------------------------------------------------------

KEEPS = (f"train.ema_decay={DECAY}", "checkpoint.keep_last=9")


def run(folder: Path, shards: Path, *overrides: str) -> Path:
    folder.mkdir(exist_ok=True)
    assert train.main(arguments(folder, shards, *overrides)) == 0
    return folder / "run"


def arguments(folder: Path, shards: Path, *overrides: str) -> list[str]:
    return [*config_of(folder, shards), *(part for override in overrides for part in ("--set", override))]


def state(run_folder: Path, step: int, name: str = "ema") -> dict[str, torch.Tensor]:
    return dict(load_file(run_folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors"))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Iterator[Path]:
    """Return a finished run of 8 steps with a checkpoint after each."""
    yield run(tmp_path_factory.mktemp("averaged"), small_shards, *KEEPS)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_each_checkpoint_holds_the_average_of_those_before_it(averaged: Path) -> None:
    for step in range(1, 8):
        before, network, after = state(averaged, step), state(averaged, step + 1, "model"), state(averaged, step + 1)
        d = min(DECAY, (1 + step) / (10 + step))
        assert after.keys() == network.keys()
        for name, tensor in after.items():
            expected = d * before[name].double() + (1 - d) * network[name].double()
            if "num_batches" in name:
                assert torch.equal(tensor, network[name])
            else:
                assert torch.allclose(tensor.double(), expected, atol=1e-6), name
    assert not torch.equal(state(averaged, 8)["fc.weight"], state(averaged, 8, "model")["fc.weight"])


def test_the_average_is_evaluated_chosen_and_exported(averaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card, weights = load_bundle(averaged)
    assert card.averaged == Averaged(ema_decay=DECAY)
    best = state(averaged, card.trained.step)
    assert all(torch.equal(weights[name], best[name]) for name in best)
    by_training = json.loads((averaged / "evaluations" / "val" / "metrics.json").read_text())
    row = next(row for row in rows(averaged) if row["step"] == card.trained.step)
    assert by_training["accuracy"] == row["val/accuracy"] == card.trained.value
    assert cli.main(["evaluate", str(averaged), "--split", "val", "--batch-size", "8"]) == 0
    evaluated = json.loads((averaged / "evaluations" / "val" / "metrics.json").read_text())
    assert evaluated["confusion"] == by_training["confusion"]
    confidences = [[one["mean_confidence"] for one in r["reliability"]["bins"]] for r in (evaluated, by_training)]
    assert confidences[0] == pytest.approx(confidences[1], abs=1e-4)


def test_an_average_changes_nothing_of_the_training(averaged: Path, small_shards: Path, tmp_path: Path) -> None:
    plain = run(tmp_path, small_shards)
    assert final_weights(averaged) == final_weights(plain)
    for ours, theirs in zip(rows(averaged), rows(plain), strict=True):
        assert ours["train/loss"] == theirs["train/loss"]
    losses = [[row["val/loss"] for row in rows(folder) if "val/loss" in row] for folder in (averaged, plain)]
    assert losses[0] != losses[1]


def test_a_run_resumed_in_the_middle_of_an_epoch_ends_with_the_same_average(
    averaged: Path, small_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(averaged / "checkpoints" / "step-00000006", tmp_path / "run" / "checkpoints" / "step-00000006")
    again = run(tmp_path, small_shards, *KEEPS)
    assert [row["step"] for row in rows(again)] == [7, 8]
    for name in ("ema", "model", "optimizer"):
        one, other = (folder / "checkpoints" / "step-00000008" / f"{name}.safetensors" for folder in (again, averaged))
        assert one.read_bytes() == other.read_bytes(), name


def test_a_checkpoint_without_an_average_is_refused_where_one_is_asked_for(
    averaged: Path, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(averaged, tmp_path / "run")
    more = ["--set", "train.epochs=3"]
    assert train.main([*arguments(tmp_path, small_shards), *more, "--set", "train.stop_at_step=9"]) == 0
    assert f"changed: train.ema_decay was {DECAY} and is 0.0" in capsys.readouterr().out
    assert train.main([*arguments(tmp_path, small_shards, *KEEPS), *more]) == 2
    said = capsys.readouterr().err
    assert "step-00000009 has no state of: ema" in said
    assert "restore the settings of that run" in said
