"""The chosen micro-batch: the largest that fits on all ranks, without side effects, and kept for the whole run."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil, log2
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kept import LINEAGE
from torch import nn
from trainings import config_of, final_weights

from wasteddp import settings as settings_file
from wasteddp import train
from wasteddp.errors import DeviceMemoryError
from wasteddp.model import networks
from wasteddp.order.plan import TrainPlan
from wasteddp.training import micro_batch
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed import startup
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.micro_batch import attempt, choose_size, most_that_fit
from wasteddp.training.objective import Objective
from wasteddp.training.watchdog.failures import explain

AUTO = settings_file.parse(
    "precision: fp32\nrun: {threads: 1}\ndata: {image_size: 32}\nmodel: {arch: resnet18}\n"
    "train: {batch_size: 96, max_micro_batch: 0}"
)
START = Progress(LINEAGE)


@given(images=st.integers(1, 5000), limit=st.integers(0, 6000))
def test_it_is_the_largest_divisor_that_fits_found_in_few_attempts(images: int, limit: int) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    divisors = [size for size in range(1, images + 1) if images % size == 0]
    assert most_that_fit(images, fits) == max((size for size in divisors if size <= limit), default=0)
    assert len(tried) == len(set(tried)) <= ceil(log2(len(divisors) + 1))


def full_above(limit: int, tried: list[int]) -> Any:
    """Return an attempt on a GPU that has memory for a given number of images."""

    def attempted(size: int, **_: Any) -> None:
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return attempted


def on_gpu(limit: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Runtime, list[int]]:
    """A runtime that reports a GPU, and the sizes that were tried on it."""
    tried: list[int] = []
    monkeypatch.setattr(micro_batch, "attempt", full_above(limit, tried))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    return replace(startup.start_runtime(AUTO), device=torch.device("cuda"), **changes), tried


def settle(runtime: Runtime, progress: Progress = START, settings: settings_file.Settings = AUTO) -> Any:
    return choose_size(settings, runtime, cast(Objective, None), cast(nn.Module, None), progress)


def test_on_a_gpu_the_largest_that_fits_is_taken_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, tried = on_gpu(40, monkeypatch)
    found, progress = settle(runtime)
    assert (found.micro_batch, found.accumulation, progress.micro_batch) == (32, 3, 32)
    assert found.micro_batch_reason == "the most of 96 that fit on every GPU with 10% of its memory to spare"
    tried.clear()
    again, progress = settle(runtime, progress)
    assert (again.micro_batch, again.accumulation, progress.micro_batch, tried) == (32, 3, 32, [])
    assert again.micro_batch_reason == "as when the run started"


def test_what_fits_is_what_fits_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, _ = on_gpu(96, monkeypatch)
    monkeypatch.setattr(Runtime, "gather", lambda self, value: [value, 24, 48])  # another rank has less memory
    found, progress = settle(runtime)
    assert (found.micro_batch, found.accumulation, progress.micro_batch) == (24, 4, 24)


def test_if_not_one_image_fits_all_ranks_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, _ = on_gpu(0, monkeypatch)
    with pytest.raises(DeviceMemoryError, match=r"train resnet18 on one image of 32 px with 10%"):
        settle(runtime)


@pytest.mark.parametrize(
    ("world_size", "size", "accumulation", "reason"),
    [
        (2, 16, 3, "as when the run started"),
        (6, 16, 1, "as when the run started"),
        (4, 12, 2, "the run started with 16, which does not divide 24: other BatchNorm groups from here on"),
        (12, 8, 1, "the run started with 16, which does not divide 8: other BatchNorm groups from here on"),
    ],
)
def test_another_number_of_ranks_keeps_the_micro_batch_if_it_divides(
    world_size: int, size: int, accumulation: int, reason: str
) -> None:
    share = 96 // world_size
    runtime = replace(startup.start_runtime(AUTO), world_size=world_size, micro_batch=share, accumulation=1)
    found, progress = settle(runtime, replace(START, micro_batch=16))
    assert (found.micro_batch, found.accumulation, found.micro_batch_reason) == (size, accumulation, reason)
    assert progress.micro_batch == 16, "going back to the first number of ranks gives the first result"


def test_on_a_cpu_it_is_a_bounded_choice_with_its_reason() -> None:
    found, progress = settle(startup.start_runtime(AUTO))
    assert (found.micro_batch, found.accumulation, progress.micro_batch) == (48, 2, 48)
    assert found.micro_batch_reason == "the largest divisor up to 64; sizes are tried on CUDA only"


def test_a_number_in_the_settings_is_left_alone() -> None:
    settings = settings_file.parse("precision: fp32\nrun: {threads: 1}\ntrain: {batch_size: 96, max_micro_batch: 32}")
    runtime = startup.start_runtime(settings)
    assert settle(runtime, settings=settings) == (runtime, START)
    assert (runtime.micro_batch, runtime.micro_batch_reason) == (32, "")


def real(settings: settings_file.Settings) -> tuple[Runtime, Objective, nn.Module]:
    runtime = startup.start_runtime(settings)
    train_split = SimpleNamespace(samples_per_class=(60, 40, 20), num_samples=120)
    data = SimpleNamespace(
        plan=TrainPlan(120, 96, 0, 96), manifest=SimpleNamespace(classes=("a", "b", "c")), train=train_split
    )
    data.share_of_classes = (1 / 2, 1 / 3, 1 / 6)
    model = networks.build("resnet18", 3).to(runtime.device)
    objective = Objective(settings, runtime, cast(Inputs, data), model)
    runtime.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return runtime, objective, model


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_attempt_leaves_no_trace(name: str) -> None:
    settings = settings_file.parse(AUTO.to_yaml(), [f"optimizer.name={name}", "augment.mixup=0.2"])
    runtime, objective, model = real(settings)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    attempt(
        4,
        runtime,
        objective,
        model,
        image_size=settings.data.image_size,
        optimizer=settings.optimizer.name,
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_an_attempt_takes_all_images_forwards_and_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, objective, model = real(AUTO)
    went: list[tuple[str, int]] = []
    model.register_forward_hook(lambda module, args, out: went.append(("forward", len(args[0]))))
    model.fc.register_full_backward_hook(lambda module, into, out: went.append(("backward", len(out[0]))))  # type: ignore[operator,union-attr]
    attempt(
        4,
        runtime,
        objective,
        model,
        image_size=AUTO.data.image_size,
        optimizer=AUTO.optimizer.name,
    )
    assert went == [("forward", 4), ("backward", 4)]


def test_memory_that_ends_later_names_which_number_to_lower() -> None:
    error = explain(torch.OutOfMemoryError("CUDA out of memory. Tried"), AUTO, "computing")
    assert isinstance(error, DeviceMemoryError)
    assert "with the micro-batch that was chosen when this run started: CUDA out of memory" in error.found
    assert "set train.max_micro_batch to less than the size in log.txt" in error.remedy


def test_a_resumed_run_takes_the_micro_batch_it_began_with_and_ends_the_same(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, stops in (("whole", []), ("parted", [2])):
        monkeypatch.setattr(startup, "MOST_UNTRIED", 4)  # as if no more had fitted when the run started
        (tmp_path / name).mkdir()
        arguments = [*config_of(tmp_path / name, small_shards), "--set", "train.max_micro_batch=0"]
        for step in stops:
            assert train.main([*arguments, "--set", f"train.stop_at_step={step}"]) == 0
            monkeypatch.setattr(startup, "MOST_UNTRIED", 64)  # now all 12 would fit
        assert train.main([*arguments, "--set", "train.stop_at_step=4"]) == 0
    whole, parted = tmp_path / "whole" / "run", tmp_path / "parted" / "run"
    assert "x 4 images x 3 accumulated (the largest divisor up to 4; sizes are" in (whole / "log.txt").read_text()
    assert "x 4 images x 3 accumulated (as when the run started)" in (parted / "log.txt").read_text()
    assert json.loads((parted / "checkpoints" / "step-00000004" / "progress.json").read_text())["micro_batch"] == 4
    assert final_weights(whole) == final_weights(parted)
