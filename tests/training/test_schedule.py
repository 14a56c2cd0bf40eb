"""Progressive sizes: a function of the epoch, with the same crops at each size, also after a resume."""

from __future__ import annotations

from functools import partial
from pathlib import Path

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
from wasteddp.training.schedule import changes, describe, side_px

GROWING = ["schedule.start_size=16", "schedule.full_size_at=0.5", "train.epochs=4", "data.image_size=48"]


def settings_of(start: int, full: int, at: float, epochs: int) -> settings_file.Settings:
    text = f"data: {{image_size: {full}}}\nschedule: {{start_size: {start}, full_size_at: {at}}}"
    return settings_file.parse(f"{text}\ntrain: {{epochs: {epochs}}}")


@given(start=st.integers(1, 16), more=st.integers(0, 300), at=st.floats(0.01, 1), epochs=st.integers(1, 200))
def test_the_side_begins_small_never_shrinks_and_ends_at_the_full_size(
    start: int, more: int, at: float, epochs: int
) -> None:
    settings = settings_of(16 * start, 16 * start + more, at, epochs)
    sides = [side_px(epoch, settings) for epoch in range(epochs + 1)]
    assert sides[0] == 16 * start
    assert sides == sorted(sides)
    for epoch, side in enumerate(sides):
        full = epoch >= at * epochs
        assert side == 16 * start + more if full else side % 16 == 0
        # at most one step below the straight line
        assert full or 0 <= 16 * start + more * epoch / (at * epochs) - side < 16 + 1e-9


def test_each_size_has_its_share_of_the_epochs() -> None:
    settings = settings_of(128, 224, 0.75, 90)
    assert changes(settings) == [(0, 128), (12, 144), (23, 160), (34, 176), (45, 192), (57, 208), (68, 224)]
    assert describe(settings_of(64, 96, 0.5, 8)) == "64 px, 80 px from epoch 2, 96 px from epoch 4"


def test_without_a_first_size_all_epochs_have_the_full_one() -> None:
    assert changes(settings_of(0, 225, 0.75, 90)) == [(0, 225)]
    assert describe(settings_of(0, 225, 0.75, 90)) == "225 px"
    assert changes(settings_of(64, 224, 0.0, 3)) == [(0, 224)]


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
        for name, size in (("fixed", 48), ("growing", partial(side_px, settings=growing))):
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
