"""A bundle is loaded as it was saved, or refused with the reason. A kill never leaves a mixture of two bundles."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import CARD, CLASSES, random_weights

from wasteddp.errors import BundleError, WastedError
from wasteddp.inference import bundle
from wasteddp.inference.bundle import Averaged, BundleCard, _hash_of_card, load_bundle, read_card, save_bundle

SMALL = {"fc.weight": torch.arange(12.0).reshape(3, 4), "fc.bias": torch.zeros(3), "bn.count": torch.tensor(7)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def change_card(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "model.json").read_text())
    content.pop("sha256", None)
    change(content)
    content["sha256"] = _hash_of_card(content)  # as if it had been written so
    (folder / "model.json").write_text(json.dumps(content))


def test_what_was_saved_is_loaded_from_the_bundle_and_from_its_run(tmp_path: Path) -> None:
    state = random_weights()
    state = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()}
    card = replace(CARD, temperature=1.25, thresholds={"glass": 0.8}, classes=("glass", "métal", "纸"), bins={})
    saved = save_bundle(tmp_path / "run" / "model", card, state)
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded_card, loaded_state = load_bundle(folder)
        assert loaded_card == saved
        assert same(loaded_state, state)
    assert replace(saved, hashes=card.hashes) == card
    names = sorted(path.name for path in (tmp_path / "run" / "model").iterdir())
    assert names == [f"model-{saved.hashes.weights[:12]}.safetensors", "model.json"]


def test_a_card_of_the_first_format_is_read_and_is_of_no_average(tmp_path: Path) -> None:
    saved = save_bundle(tmp_path, CARD, SMALL)
    change_card(tmp_path, lambda card: (card.pop("averaged"), card.update(format_version=1)))
    assert load_bundle(tmp_path)[0] == saved
    assert str(saved.averaged) == ""


@pytest.mark.parametrize("averaged", [Averaged(ema_decay=0.999), Averaged(steps=(10, 20))], ids=str)
def test_a_card_names_the_checkpoints_of_averaged_weights(tmp_path: Path, averaged: Averaged) -> None:
    save_bundle(tmp_path, replace(CARD, averaged=averaged), SMALL)
    assert load_bundle(tmp_path)[0].averaged == averaged


def test_a_card_is_read_without_torch(tmp_path: Path) -> None:
    save_bundle(tmp_path, CARD, SMALL)
    code = (
        "import sys; from pathlib import Path; from wasteddp.inference.bundle import _hash_of_card, read_card\n"
        "print(*read_card(Path(sys.argv[1])).classes); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(CLASSES)


@pytest.mark.parametrize("written_before_the_kill", range(3))
def test_a_kill_while_saving_leaves_the_old_bundle_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_before_the_kill: int
) -> None:
    old = save_bundle(tmp_path, CARD, SMALL)
    newer_state = {**SMALL, "fc.bias": torch.ones(3)}
    newer_card = replace(CARD, trained=replace(CARD.trained, step=240))
    written = 0

    def write_or_die(path: Path, content: bytes) -> None:
        nonlocal written
        if written == written_before_the_kill:
            path.with_name(path.name + ".tmp").write_bytes(content[: len(content) // 2])
            raise KeyboardInterrupt
        written += 1
        path.write_bytes(content)

    with monkeypatch.context() as patched:
        patched.setattr(bundle, "write_atomically", write_or_die)
        if written_before_the_kill == 2:  # both files are written: die before the old weights are removed
            patched.setattr(Path, "unlink", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_bundle(tmp_path, newer_card, newer_state)

    card, state = load_bundle(tmp_path)
    if written_before_the_kill < 2:
        assert card == old
        assert same(state, SMALL)
    else:
        assert card.trained.step == 240
        assert same(state, newer_state)
    saved = save_bundle(tmp_path, newer_card, newer_state)  # the next save removes what the kill left
    assert sorted(path.name for path in tmp_path.iterdir()) in (
        [saved.weights_name, "model.json"],
        [saved.weights_name, "model.json", "model.json.tmp"],
    )
    assert load_bundle(tmp_path)[0] == saved


def test_a_card_of_version_1_is_read(tmp_path: Path) -> None:
    """Version 1 has no teacher."""
    saved = save_bundle(tmp_path, CARD, SMALL)

    def older(content: dict[str, Any]) -> None:
        content["format_version"] = 1
        del content["hashes"]["teacher"]

    change_card(tmp_path, older)
    assert load_bundle(tmp_path)[0] == saved


def test_saving_the_same_weights_again_keeps_them(tmp_path: Path) -> None:
    first = save_bundle(tmp_path, CARD, SMALL)
    assert save_bundle(tmp_path, CARD, SMALL) == first
    assert same(load_bundle(tmp_path)[1], SMALL)


def test_a_model_that_is_replaced_between_the_two_reads_is_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bundle(tmp_path, CARD, SMALL)
    newer = {**SMALL, "fc.bias": torch.ones(3)}
    reads = 0

    def read_then_replace(folder: Path) -> BundleCard:
        nonlocal reads
        card = read_card(folder)
        if (reads := reads + 1) == 1:
            save_bundle(tmp_path, CARD, newer)
        return card

    monkeypatch.setattr(bundle, "read_card", read_then_replace)
    assert same(load_bundle(tmp_path)[1], newer)


def test_places_without_a_model_are_distinguished(tmp_path: Path) -> None:
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("nowhere", "there is no folder"),
        ("file", "is a file"),
        ("young", r"the run .*young has no model/model.json yet\n.*\n.*after its first validation"),
        ("empty", "holds neither model.json nor model/model.json"),
    ):
        with pytest.raises(BundleError, match=message):
            load_bundle(tmp_path / name)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "folder", "pipe"])
def test_damaged_weights_are_refused_by_their_hash(tmp_path: Path, damage: str) -> None:
    path = tmp_path / save_bundle(tmp_path, CARD, SMALL).weights_name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
        message = rf"has {len(content)} bytes with sha256 \w+, and model.json says"
    elif damage == "cut":
        path.write_bytes(content[:-1])
        message = f"has {len(content) - 1} bytes"
    elif damage == "folder":
        path.unlink()
        path.mkdir()
        message = "cannot be read: Is a directory"
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
        message = "cannot be read: it is a pipe or a device, not a file"
    else:
        path.unlink()
        message = "cannot be read: No such file or directory"
    with pytest.raises(BundleError, match=re.escape(path.name) + " " + message):
        load_bundle(tmp_path)


def test_weights_that_are_no_safetensors_are_refused_though_their_hash_is_right(tmp_path: Path) -> None:
    save_bundle(tmp_path, CARD, SMALL)
    content = b"\x80\x04 a pickle, say"
    digest = hashlib.sha256(content).hexdigest()
    change_card(tmp_path, lambda card: card["hashes"].update(weights=digest))
    (tmp_path / f"model-{digest[:12]}.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match="is not a safetensors file"):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=6, tool="wasteddp 9.0"), "has format version 6, made by wasteddp 9.0"),
        (lambda c: c.update(format="onnx"), "its format is 'onnx', not 'wasteddp-model'"),
        (lambda c: c.pop("classes"), "not a model's card: KeyError: 'classes'"),
        (lambda c: c.update(colour="red"), "unexpected keyword argument 'colour'"),
        (lambda c: c.update(classes=["a", "a", "b"]), "the classes are not different names"),
        (lambda c: c.update(temperature=0), "the temperature is 0"),
        (lambda c: c["preprocessing"].update(image_size_px=0), "the image size is 0 of 36 px"),
        (lambda c: c["preprocessing"].update(std=[1, 1]), "are not three numbers each"),
        (lambda c: c.update(classes=["a", "b"]), r"names 2 classes, and the weights' last layer fc.weight is \[3, 4\]"),
    ],
)
def test_a_card_that_cannot_be_right_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    save_bundle(tmp_path, CARD, SMALL)
    change_card(tmp_path, change)
    with pytest.raises(BundleError, match=message):
        load_bundle(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format": ', '"x"', "[" * 100_000], ids=repr)
def test_a_card_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    save_bundle(tmp_path, CARD, SMALL)
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(BundleError, match="is not a model's card"):
        load_bundle(tmp_path)


def test_weights_without_a_head_are_refused(tmp_path: Path) -> None:
    save_bundle(tmp_path, CARD, {"conv1.weight": torch.zeros(2)})
    with pytest.raises(BundleError, match=r"the weights' last layer fc.weight is missing"):
        load_bundle(tmp_path)


def test_a_place_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(WastedError, match=r"writing the model: Not a directory"):
        save_bundle(tmp_path / "run" / "model", CARD, SMALL)
