"""A manifest is read as it was written, or refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wasteddp.data.manifest import INDEX_DTYPE, MANIFEST_NAME, REASONS, LeftOut, Manifest, Shard, Split, read_index
from wasteddp.errors import ShardError, StorageError
from wasteddp.files import read_regular, write_atomically


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    index = np.zeros(3, INDEX_DTYPE).tobytes()
    (tmp_path / "train-000000.idx").write_bytes(index)
    digest = hashlib.sha256(index).hexdigest()
    shard = Shard("train-000000.tar", "train-000000.idx", 3, 10240, "0" * 64, digest)
    made = Manifest(
        folder=tmp_path,
        name="set",
        classes=("glass", "métal"),
        splits={"train": Split("train", (shard,), (2, 1)), "val": Split("val", (), (0, 0))},
        bins={"glass": "glass", "métal": "packaging"},
        left_out=(LeftOut("a.jpg", "empty", "0 bytes"),),
        near_duplicates={"pairs": []},
        recipe={"title": "x"},
        tool="test",
    )
    made.save()
    return made


def change(folder: Path, edit: Callable[[Any], object]) -> None:
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    edit(raw)
    (folder / MANIFEST_NAME).write_text(json.dumps(raw))


def test_it_reads_back_what_was_written_and_its_hash_is_that_of_its_file(manifest: Manifest) -> None:
    loaded = Manifest.load(manifest.folder)
    digest = hashlib.sha256((manifest.folder / MANIFEST_NAME).read_bytes()).hexdigest()
    assert loaded == replace(manifest, sha256=digest)
    assert loaded.split("train").num_samples == 3
    assert INDEX_DTYPE.itemsize == 48
    assert len(read_index(loaded.folder, loaded.split("train").shards[0])) == 3


def test_a_missing_or_empty_split_is_refused_with_the_names_of_the_others(manifest: Manifest) -> None:
    for name in ("val", "test"):
        with pytest.raises(ShardError, match=rf"no samples in a split called '{name}'; its splits: train \(3\), val"):
            manifest.split(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.update(format="other"), "format 'other'"),
        (lambda raw: raw.update(format_version=2), "version 2"),
        (lambda raw: raw["splits"]["train"].update(num_samples=4), "sample counts of split 'train' do not add up"),
        (lambda raw: raw["splits"]["train"].update(samples_per_class=[3]), "split 'train' has counts of 1 classes"),
        (lambda raw: raw["splits"]["train"]["shards"][0].update(tar="../../x.tar"), "is not a plain file name"),
        (lambda raw: raw.pop("classes"), "KeyError: 'classes'"),
        (lambda raw: raw.update(classes=["a", "a"]), "a class is named twice: a"),
        (lambda raw: raw.update(classes=["a", 1]), "are not a list of names"),
        (lambda raw: raw.update(classes=["a", ""]), "are not a list of names"),
        (lambda raw: raw.update(classes=["a", "m\udce9tal"]), "surrogates not allowed"),
        (lambda raw: raw["splits"]["train"]["shards"][0].update(num_bytes="10240"), "'10240' is not a count"),
        (lambda raw: raw["splits"]["train"].update(samples_per_class=[4, -1]), "-1 is not a count"),
        (lambda raw: raw["left_out"][0].update(reason=7), "reason is 7, not a text"),
        (lambda raw: raw.update(recipe=[]), r"recipe is \[\]"),
        (lambda raw: raw.update(bins={"glass": 1}), "are not all names"),
        (lambda raw: raw.update(near_duplicates={"pairs": True}), "'bool' object is not iterable"),
        (lambda raw: raw.update(near_duplicates={"pairs": [["a", "train"]]}), "is not a pair of near-duplicates"),
        (
            lambda raw: raw.update(near_duplicates={"across_splits": {"train-val": 3}}),
            "there are no splits|not subscriptable",
        ),
        (lambda raw: raw.update(recipe={"options": {"fractions": [1]}}), r"the fractions of the splits are \[1\]"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    manifest: Manifest, edit: Callable[[Any], object], message: str
) -> None:
    change(manifest.folder, edit)
    with pytest.raises(ShardError, match=message):
        Manifest.load(manifest.folder)


def test_no_folder_and_no_manifest_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "images" / "glass").mkdir(parents=True)
    (tmp_path / "images.zip").touch()
    with pytest.raises(ShardError, match=r"is a file, not the folder (.|\n)*wasteddp shard .*images.zip --out"):
        Manifest.load(tmp_path / "images.zip")
    with pytest.raises(ShardError, match=r"holds no manifest.json and no tar(.|\n)*wasteddp shard .*images --out"):
        Manifest.load(tmp_path / "images")
    with pytest.raises(ShardError, match=rf"there is no folder no/where in {Path.cwd()}"):
        Manifest.load("no/where")
    with pytest.raises(ShardError, match=r"there is no folder (.|\n)*wasteddp shard SOURCE --out"):
        Manifest.load(tmp_path / "nowhere")
    (tmp_path / "a.tar").touch()
    with pytest.raises(ShardError, match=r"holds 1 tar file\(s\) but no manifest.json(.|\n)*wasteddp index"):
        Manifest.load(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text("{")
    with pytest.raises(ShardError, match="is not a manifest of this format: JSONDecodeError"):
        Manifest.load(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text("[" * 100_000)
    with pytest.raises(ShardError, match="is not a manifest of this format: RecursionError"):
        Manifest.load(tmp_path)


def test_a_damaged_or_missing_index_is_refused(manifest: Manifest) -> None:
    shard = manifest.splits["train"].shards[0]
    path = manifest.folder / shard.index
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(ShardError, match="has 144 bytes and sha256"):
        read_index(manifest.folder, shard)
    path.unlink()
    with pytest.raises(ShardError, match=r"cannot be read: No such file(.|\n)*3 samples of train-000000.tar"):
        read_index(manifest.folder, shard)


def test_a_failed_write_leaves_what_was_there_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="writing: No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_pipe_or_a_name_that_no_file_can_have_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "a pipe or a device"), ("a\0b", "NUL"), ("x" * 300, "too long"), (".", "directory")):
        with pytest.raises(OSError, match=reason):
            read_regular(tmp_path / name)


def test_every_reason_that_the_steps_give_is_known() -> None:
    assert {
        "unreadable",
        "truncated",
        "empty",
        "too_large",
        "duplicate",
        "conflicting_label",
        "not_listed",
        "unknown_range",
        "dropped",
    } == set(REASONS)
