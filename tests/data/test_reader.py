"""Reading by offset: the same bytes as webdataset reads, and an error that names each kind of damage."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset

from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.errors import DamagedSampleError, ShardError


@pytest.fixture
def shards(small_shards: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(small_shards, tmp_path / "shards"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset does not close its tars
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_it_reads_what_webdataset_reads(small_shards: Path, split: str) -> None:
    manifest = Manifest.load(small_shards)
    urls = [str(small_shards / shard.tar) for shard in manifest.split(split).shards]
    foreign = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    gc.collect()
    with SplitReader(manifest, split) as reader:
        assert reader.num_samples == len(foreign) == {"train": 50, "val": 13, "test": 10}[split]
        for sample, theirs in enumerate(foreign):
            assert reader.read(sample) == theirs["jpg"]
            assert reader.key(sample) == theirs["__key__"]
            metadata = json.loads(theirs["json"])
            assert int(reader.labels[sample]) == metadata["label_number"]
            assert manifest.classes[reader.labels[sample]] == metadata["label"]
            assert reader.source(sample) == metadata["source"]
            assert hashlib.sha256(theirs["jpg"]).hexdigest() == metadata["sha256"]
        assert np.bincount(reader.labels).tolist() == list(manifest.split(split).samples_per_class)
    if split == "train":
        assert len(urls) > 1


def test_a_flipped_byte_is_named_with_shard_sample_and_place(shards: Path) -> None:
    manifest = Manifest.load(shards)
    with SplitReader(manifest, "train") as reader:
        offset = int(reader._index[7]["offset"])
    path = shards / manifest.split("train").shards[0].tar
    with path.open("r+b") as file:
        file.seek(offset + 100)
        byte = file.read(1)
        file.seek(offset + 100)
        file.write(bytes([byte[0] ^ 1]))
    with SplitReader(manifest, "train") as reader:
        reader.read(6)
        with pytest.raises(DamagedSampleError, match=rf"train-000000.tar, sample 7 at byte {offset}: its \d+ bytes"):
            reader.read(7)


@pytest.mark.parametrize("damage", ["cut", "missing", "unreadable index", "missing index"])
def test_a_damaged_set_is_refused_before_it_is_read(shards: Path, damage: str) -> None:
    manifest = Manifest.load(shards)
    shard = manifest.split("train").shards[1]
    if damage == "cut":
        os.truncate(shards / shard.tar, shard.num_bytes - 512)
        expected = rf"{shard.tar} has {shard.num_bytes - 512} bytes; in the manifest it has {shard.num_bytes}"
    elif damage == "missing":
        (shards / shard.tar).unlink()
        expected = rf"{shard.tar} cannot be opened: No such file"
    elif damage == "unreadable index":
        (shards / shard.index).write_bytes(b"x" * 48 * shard.num_samples)
        expected = rf"the index .*{shard.index} has \d+ bytes and sha256"
    else:
        (shards / shard.index).unlink()
        expected = rf"the index .*{shard.index} cannot be read"
    with pytest.raises(ShardError, match=expected):
        SplitReader(manifest, "train")


def test_a_tar_that_shrinks_while_it_is_read_is_named(shards: Path) -> None:
    manifest = Manifest.load(shards)
    with SplitReader(manifest, "val") as reader:
        os.truncate(shards / manifest.split("val").shards[0].tar, 600)
        with pytest.raises(DamagedSampleError, match=r"the tar ends after 88 of \d+ bytes"):
            reader.read(0)
