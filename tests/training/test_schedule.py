"""Learning rates, image sizes and frozen stages as functions of the step; sizes with the same crops, and a resume."""

from __future__ import annotations

from functools import partial
from math import ceil, cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainings import config_of, final_weights

from wasteddp import settings as settings_file
from wasteddp import train
from wasteddp.data.decoding import crop
from wasteddp.data.decoding.crop import crop_box
from wasteddp.data.loader import training_loader, training_steps
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.errors import SettingsError
from wasteddp.order.plan import TrainPlan
from wasteddp.training.schedule import (
    describe_sizes,
    frozen_at,
    frozen_to_the_end,
    has_new_size,
    learning_rate,
    side_px,
    size_changes,
)

GROWING = ["schedule.start_size=16", "schedule.full_size_at=0.5", "train.epochs=4", "data.image_size=48"]


def settings_of(start: int, full: int, at: float, epochs: int) -> settings_file.Settings:
    text = f"data: {{image_size: {full}}}\nschedule: {{start_size: {start}, full_size_at: {at}}}"
    return settings_file.parse(f"{text}\ntrain: {{epochs: {epochs}}}")


def sizes_of(settings: settings_file.Settings) -> dict[str, Any]:
    """The arguments of the functions of the size."""
    return {
        "schedule": settings.schedule,
        "full_px": settings.data.image_size,
        "epochs": settings.train.epochs,
    }


@given(start=st.integers(1, 16), more=st.integers(0, 300), at=st.floats(0.01, 1), epochs=st.integers(1, 200))
def test_the_side_begins_small_never_shrinks_and_ends_at_the_full_size(
    start: int, more: int, at: float, epochs: int
) -> None:
    settings = settings_of(16 * start, 16 * start + more, at, epochs)
    sides = [side_px(epoch, **sizes_of(settings)) for epoch in range(epochs + 1)]
    assert sides[0] == 16 * start
    assert sides == sorted(sides)
    for epoch, side in enumerate(sides):
        full = epoch >= at * epochs
        assert side == 16 * start + more if full else side % 16 == 0
        # at most one step below the straight line
        assert full or 0 <= 16 * start + more * epoch / (at * epochs) - side < 16 + 1e-9


def test_each_size_has_its_share_of_the_epochs() -> None:
    settings = settings_of(128, 224, 0.75, 90)
    assert size_changes(**sizes_of(settings)) == [
        (0, 128),
        (12, 144),
        (23, 160),
        (34, 176),
        (45, 192),
        (57, 208),
        (68, 224),
    ]
    new = [epoch for epoch in range(90) if has_new_size(epoch, **sizes_of(settings))]
    assert new == [12, 23, 34, 45, 57, 68]
    assert describe_sizes(**sizes_of(settings_of(64, 96, 0.5, 8))) == "64 px, 80 px from epoch 2, 96 px from epoch 4"


def test_without_a_first_size_all_epochs_have_the_full_one() -> None:
    assert size_changes(**sizes_of(settings_of(0, 225, 0.75, 90))) == [(0, 225)]
    assert describe_sizes(**sizes_of(settings_of(0, 225, 0.75, 90))) == "225 px"
    assert size_changes(**sizes_of(settings_of(64, 224, 0.0, 3))) == [(0, 224)]


@pytest.mark.parametrize(("start", "found"), [(100, "is not a multiple of 16"), (240, "is not from 16 to data.image")])
def test_an_impossible_first_size_is_refused(start: int, found: str) -> None:
    with pytest.raises(SettingsError, match=f"schedule.start_size {start} {found}"):
        settings_of(start, 224, 0.75, 90)


def test_batches_on_both_sides_of_an_epochs_edge_have_their_own_size_and_the_same_crops(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[tuple[int, tuple[int, ...]]] = []
    real = crop.training_view

    def seen(data: bytes, *, image_size_px: int, **how: object) -> np.ndarray:
        uniform = how["uniform"]
        assert isinstance(uniform, np.ndarray)
        boxes.append((len(data), crop_box(40, 48, scale=(0.3, 1.0), ratio=(0.75, 1.33), uniform=uniform)))
        return real(data, image_size_px=image_size_px, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(crop, "training_view", seen)
    sides: dict[str, list[tuple[int, ...]]] = {}
    found: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    plan, ends = TrainPlan(50, 12, 0, 12), []
    growing = settings_of(16, 48, 0.5, 4)
    with SplitReader(Manifest.load(small_shards), "train") as reader:
        for name, size in (("fixed", 48), ("growing", partial(side_px, **sizes_of(growing)))):
            boxes.clear()
            with training_loader(
                reader,
                seed=0,
                image_size_px=size,  # type: ignore[arg-type]
                crop_scale=(0.3, 1.0),
                crop_ratio=(0.75, 1.33),
                workers=1,
                prefetch=3,  # so that the loader works on two epochs at the same time
                pin_memory=False,
            ) as loader:
                batches = list(loader.batches(training_steps(plan, 0, 12, rank=0, world_size=1)))
            sides[name] = [tuple(batch.images_BCHW.shape) for batch in batches]
            found[name] = sorted(boxes)
            ends.append(batches[-1].images_BCHW)
    assert sides["fixed"] == [(12, 3, 48, 48)] * 12
    assert sides["growing"] == [(12, 3, side, side) for side in (16, 32, 48) for _ in range(4)]
    assert found["growing"] == found["fixed"]
    assert torch.equal(*ends), "at the full size nothing tells that there were others"


def test_a_run_stopped_in_the_middle_of_growing_ends_with_the_same_weights(small_shards: Path, tmp_path: Path) -> None:
    more = [part for setting in GROWING for part in ("--set", setting)]
    more += ["--set", "run.record_steps=true"]
    ends = []
    for name, stops in (("whole", []), ("parted", [6])):
        (tmp_path / name).mkdir()
        arguments = [*config_of(tmp_path / name, small_shards), *more]
        for step in stops:
            assert train.main([*arguments, "--set", f"train.stop_at_step={step}"]) == 0
        assert train.main([*arguments, "--set", "train.stop_at_step=10"]) == 0
        run = tmp_path / name / "run"
        ends.append((final_weights(run), (run / "steps.jsonl").read_text()))
        assert "3 classes, 16 px, 32 px from epoch 1, 48 px from epoch 2; " in (run / "log.txt").read_text()
    assert ends[0] == ends[1]


def rate_of(step: int, settings: settings_file.Settings, steps_per_epoch: int) -> float:
    epochs, peak = settings.train.epochs, settings.optimizer.lr
    return learning_rate(step, peak, settings.schedule, epochs=epochs, steps_per_epoch=steps_per_epoch)


def rates(text: str, steps_per_epoch: int = 10) -> list[float]:
    parsed = settings_file.parse(f"train: {{epochs: 10}}\noptimizer: {{lr: 1.0}}\n{text}")
    return [rate_of(step, parsed, steps_per_epoch) for step in range(10 * steps_per_epoch)]


def test_cosine_with_warmup_is_the_formula() -> None:
    found = rates("schedule: {name: cosine, warmup_epochs: 2, final_fraction: 0.1}")
    assert found[:20] == pytest.approx([0.01 + 0.99 * step / 20 for step in range(20)])
    assert found[20:] == pytest.approx([0.1 + 0.9 * (1 + cos(pi * step / 80)) / 2 for step in range(80)])


def test_steps_drop_at_their_epochs() -> None:
    found = rates("schedule: {name: step, step_epochs: 4, step_factor: 0.5}")
    assert found == pytest.approx([1.0] * 40 + [0.5] * 40 + [0.25] * 20)


def test_constant_is_constant_after_its_warmup() -> None:
    found = rates("schedule: {name: constant, warmup_epochs: 0.5}")
    assert found[0] == 0.01
    assert set(found[5:]) == {1.0}


@pytest.mark.parametrize(
    ("factor", "lengths"), [(1.0, [30] * 3), (2.0, [30, 60]), (1.5, [30, 45, 67.5]), (1.001, [30, 30.03])]
)
def test_cosine_with_restarts_is_its_cycles_laid_end_to_end(factor: float, lengths: list[float]) -> None:
    cycles = f"name: cosine_restarts, cycle_epochs: 3, cycle_factor: {factor}"
    found = rates(f"schedule: {{{cycles}, warmup_epochs: 1, final_fraction: 0.2}}")
    assert found[:10] == pytest.approx([0.01 + 0.99 * step / 10 for step in range(10)])
    for step in range(90):
        begin = 0.0
        for length in lengths:  # the slow method: a loop over the cycles
            if step < begin + length - 1e-9:
                assert found[10 + step] == pytest.approx(0.2 + 0.8 * (1 + cos(pi * (step - begin) / length)) / 2)
                break
            begin += length
    assert found[10] == 1.0
    if factor in (1.0, 2.0):
        assert found[40] == 1.0
        assert found[39] < 0.21


@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-15, 1.0 + 1e-9, 1.01, 2.0, 3.0, 7.5, 1e6])
def test_restarts_come_at_their_steps_in_the_longest_run(factor: float) -> None:
    """A million epochs of 1000 steps: each cycle starts at the peak, right after the previous cycle."""
    schedule = f"schedule: {{name: cosine_restarts, cycle_epochs: 1, cycle_factor: {factor!r}}}"
    parsed = settings_file.parse(f"train: {{epochs: 1000000}}\noptimizer: {{lr: 1.0}}\n{schedule}")
    begin, length = 0.0, 1000.0
    for _ in range(200):
        if begin > 1e9:
            break
        first = ceil(begin - 1e-6)
        assert rate_of(first, parsed, 1000) == pytest.approx(1, abs=3e-6)
        if first:
            assert rate_of(first - 1, parsed, 1000) < 0.01
        begin, length = begin + length, length * factor


def test_stages_are_unfrozen_one_after_another_from_the_last() -> None:
    def found(freeze: str, every: float) -> list[str]:
        return [frozen_at(freeze, every, step / 10) for step in range(0, 80, 5)]

    assert found("none", 1) == ["none"] * 16
    assert found("layer2", 0) == ["layer2"] * 16
    assert found("layer2", 2.0) == ["layer2"] * 4 + ["layer1"] * 4 + ["stem"] * 4 + ["none"] * 4
    assert found("backbone", 0.5)[:7] == ["backbone", "layer3", "layer2", "layer1", "stem", "none", "none"]
    # 0.3 / 0.1 is below 3 in floating point; a stage must not be unfrozen one step late
    assert (frozen_at("layer3", 0.1, 3 / 10), frozen_at("layer3", 0.1, 0.2999)) == ("stem", "layer1")


@pytest.mark.parametrize(
    ("every", "epochs", "expected"),
    [(0, 90, "layer2"), (2, 2, "layer2"), (2, 3, "layer1"), (1, 3, "stem"), (1, 4, "none")],
)
def test_only_what_is_never_trained_is_frozen_permanently(every: float, epochs: int, expected: str) -> None:
    parsed = settings_file.parse(f"model: {{freeze: layer2, unfreeze_every_epochs: {every}}}").model
    assert frozen_to_the_end(parsed, epochs) == expected
    last = frozen_at("layer2", every, epochs - 1 / 1000)  # with 1,000 steps in an epoch
    assert last == expected
