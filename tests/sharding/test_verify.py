"""`wasteddp verify` names every damaged shard and sample, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from wasteddp.cli import main
from wasteddp.data.manifest import Manifest, read_index
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.verify import verify


@pytest.fixture
def shard_set(image_folder: Callable[..., Path], tmp_path: Path) -> Manifest:
    return make_shards(Job(image_folder(), tmp_path / "set", Options(shard_mb=0.02)), workers=2)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_whole_set_is_proved_by_the_command(shard_set: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(shard_set.folder)]) == 0
    assert "is whole: 33 samples in" in capsys.readouterr().out


def test_damaged_images_are_named_with_key_and_source(shard_set: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    shard = shard_set.splits["train"].shards[0]
    index = read_index(shard_set.folder, shard)
    for number in (1, 3):
        overwrite(shard_set.folder / shard.tar, int(index[number]["offset"]) + 50, b"damage")
    verified = verify(shard_set.folder, workers=2)
    assert verified.damage[0] == f"{shard.tar}: another sha256; damaged: 2 of {shard.num_samples} samples"
    assert [line.split()[0] for line in verified.damage[1:]] == ["train-00000001", "train-00000003"]
    assert all(".jpg): the image" in line for line in verified.damage[1:])
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(shard_set.folder)])
    assert stopped.value.code == 2
    assert "train-00000003" in capsys.readouterr().err


def test_a_damaged_header_and_a_damaged_label_are_named(shard_set: Manifest) -> None:
    shard = shard_set.splits["train"].shards[0]
    tar, index = shard_set.folder / shard.tar, read_index(shard_set.folder, shard)
    overwrite(tar, int(index[0]["offset"]) - 500, b"\xff\xff")
    label = tar.read_bytes().index(b'"label_number": ', int(index[2]["offset"]))
    overwrite(tar, label + len(b'"label_number": '), b"9")
    damage = verify(shard_set.folder, workers=1).damage
    assert len(damage) == 3
    assert damage[1].startswith("  sample 0 (")
    assert damage[1].endswith("its header or label")
    assert damage[2].startswith("  train-00000002 (")
    assert damage[2].endswith("its header or label")


def test_padding_missing_tars_cut_tars_and_indexes_are_distinguished(shard_set: Manifest) -> None:
    train, val = shard_set.splits["train"].shards, shard_set.splits["val"].shards
    overwrite(shard_set.folder / train[0].tar, train[0].num_bytes - 10, b"x")
    (shard_set.folder / train[1].tar).unlink()
    (shard_set.folder / train[2].index).write_bytes(b"short")
    with (shard_set.folder / val[0].tar).open("r+b") as file:
        file.truncate(2000)
    damage = "\n".join(verify(shard_set.folder, workers=3).damage)
    assert f"{train[0].tar}: another sha256; damaged: none of its samples, only padding" in damage
    assert f"{train[1].tar}: cannot be read: No such file or directory" in damage
    assert f"{train[2].index} has 5 bytes" in damage
    assert f"{val[0].tar}: 2,000 bytes instead of {val[0].num_bytes:,}; damaged: " in damage


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_tar_in_two_splits_is_damage(shard_set: Manifest, is_copied: bool) -> None:
    train, val = shard_set.splits["train"], shard_set.splits["val"]
    shard = train.shards[0]
    if is_copied:  # under another name
        for name in (shard.tar, shard.index):
            copy = name.replace("train", "val-of")
            (shard_set.folder / copy).write_bytes((shard_set.folder / name).read_bytes())
        shard = replace(shard, tar=shard.tar.replace("train", "val-of"), index=shard.index.replace("train", "val-of"))
    labels = read_index(shard_set.folder, shard)["label"].tolist()
    counts = tuple(count + labels.count(label) for label, count in enumerate(val.samples_per_class))
    both = replace(val, shards=(*val.shards, shard), samples_per_class=counts)
    replace(shard_set, splits={**shard_set.splits, "val": both}).save()
    found = verify(shard_set.folder, workers=1).damage
    assert found == (f"{shard.tar} of split val is {train.shards[0].tar} of split train",)
