"""Differences from a checkpoint are refused with their consequence, or accepted by name, and always reported."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest
from kept import LINEAGE

from wasteddp import settings
from wasteddp.errors import CheckpointError
from wasteddp.training.checkpoint.progress import ACCEPTABLE, REFUSED, Lineage, accepted_changes, changed_settings


def test_every_field_has_its_consequence() -> None:
    assert ACCEPTABLE.keys() | REFUSED.keys() == {field.name for field in fields(Lineage)}
    assert not ACCEPTABLE.keys() & REFUSED.keys()


def test_the_same_run_has_nothing_to_say() -> None:
    assert accepted_changes(LINEAGE, LINEAGE, ["seed"], where="x") == []


def test_another_run_is_refused_with_what_differs_and_how_to_accept_it() -> None:
    with pytest.raises(CheckpointError) as caught:
        accepted_changes(LINEAGE, replace(LINEAGE, seed=3, batch_size=64, lanes=64), ["lanes"], where="step-00000004")
    said = str(caught.value)
    assert "step-00000004 belongs to another run: seed was 0 and is 3; batch_size was 32 and is 64" in said
    assert ACCEPTABLE["seed"] in said
    assert "--accept-changes seed,batch_size" in said


def test_what_was_accepted_is_reported() -> None:
    lines = accepted_changes(LINEAGE, replace(LINEAGE, seed=3), ["seed"], where="x")
    assert lines == [f"accepted: seed was 0 and is 3; {ACCEPTABLE['seed']}"]


@pytest.mark.parametrize("change", [{"classes": ("glass", "metal")}, {"arch": "resnet50"}, {"optimizer": "adam"}])
def test_what_cannot_go_together_cannot_be_accepted(change: dict[str, object]) -> None:
    (name,) = change
    other = replace(LINEAGE, **change)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError) as caught:
        accepted_changes(LINEAGE, other, [], where="x")
    assert "--accept-changes" not in str(caught.value)
    with pytest.raises(CheckpointError, match=f"--accept-changes {name}: this change cannot be accepted"):
        accepted_changes(LINEAGE, other, [name], where="x")


def test_another_normalisation_is_refused_and_older_checkpoints_have_imagenets() -> None:
    with pytest.raises(CheckpointError, match=r"mean was \(0.485, 0.456, 0.406\) and is \(0.5, 0.5, 0.5\)"):
        accepted_changes(LINEAGE, replace(LINEAGE, mean=(0.5, 0.5, 0.5)), [], where="x")
    raw = json.loads(json.dumps(asdict(LINEAGE)))
    assert Lineage.from_json(raw) == LINEAGE
    del raw["mean"], raw["std"]
    assert Lineage.from_json(raw) == LINEAGE


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match="name changes that can be accepted: manifest, seed"):
        accepted_changes(LINEAGE, LINEAGE, ["sed"], where="x")


def test_settings_that_may_change_are_reported() -> None:
    then = settings.parse("optimizer: {lr: 0.1}\nrun: {out: a}\naugment: {crop_scale: [0.1, 1.0]}")
    now = settings.parse("optimizer: {lr: 0.2}\nrun: {out: b}\naugment: {crop_scale: [0.2, 1.0]}")
    assert changed_settings(then.to_yaml(), now) == [
        "changed: augment.crop_scale was [0.1, 1.0] and is [0.2, 1.0]",
        "changed: optimizer.lr was 0.1 and is 0.2",
    ]
    assert changed_settings("optimizer: {}\n", now) == [], "a setting that there was not then is at its default"
