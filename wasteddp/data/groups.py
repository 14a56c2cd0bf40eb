"""The group of each sample of a shard set: its site, camera, session or object.

`groups.bin` has one line of JSON, the names of the groups, and then one int32 for each sample, little-endian: the
number of its group. Its samples are those of all tars, by the name of the tar and in the tar's order. The manifest has
its size and sha256.

Legend: N samples of a split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.data.manifest import Manifest, Shard
from wasteddp.errors import ShardError, storage
from wasteddp.files import read_regular, write_atomically

GROUPS_NAME = "groups.bin"
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Groups:
    rule: str  # how they were found, such as "column site"
    names: tuple[str, ...]
    numbers_of_tar: Mapping[str, I32]  # the group of each sample: its place in `names`

    def of_split(self, manifest: Manifest, split: str) -> I32:
        """Return the group of each sample of a split: int32 [N], places in `names`."""
        parts = [self.numbers_of_tar[shard.tar] for shard in manifest.split(split).shards]
        return np.concatenate(parts)


def save_groups(manifest: Manifest, groups: Groups) -> Mapping[str, Any]:
    """Write `groups.bin` and return what the manifest records of it."""
    body = b"".join(groups.numbers_of_tar[shard.tar].astype("<i4").tobytes() for shard in _shards(manifest))
    content = json.dumps(groups.names).encode() + b"\n" + body
    write_atomically(manifest.folder / GROUPS_NAME, content)
    return {
        "rule": groups.rule,
        "num_groups": len(groups.names),
        "file": GROUPS_NAME,
        "num_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def read_groups(manifest: Manifest, read: Callable[[str], bytes] | None = None) -> Groups | None:
    """Return the groups of a set; None if it has none.

    Args:
        read: returns the bytes of a file of the set; by default from its folder.

    Raises:
        ShardError: the file is damaged. StorageError: it cannot be read.
    """
    if not manifest.groups:
        return None
    record = manifest.groups
    if read is None:
        path = manifest.folder / record["file"]
        with storage("reading the groups of a set", path):
            content = read_regular(path)
    else:
        content = read(record["file"])
    head, _, body = content.partition(b"\n")
    num_samples = sum(shard.num_samples for shard in _shards(manifest))
    if hashlib.sha256(content).hexdigest() != record["sha256"] or len(body) != 4 * num_samples:
        raise ShardError(
            f"{manifest.where}/{record['file']} has {len(content):,} bytes and another sha256 than in the manifest "
            f"({record['num_bytes']:,} bytes)",
            "images would be counted for the wrong group",
            "copy the file again from a good copy, or make the set again with `wasteddp shard --overwrite`",
        )
    numbers = np.frombuffer(body, "<i4")
    shards = _shards(manifest)
    ends = np.cumsum([shard.num_samples for shard in shards]).tolist()
    of_tar = {
        shard.tar: numbers[end - shard.num_samples : end].astype(np.int32)
        for shard, end in zip(shards, ends, strict=True)
    }
    try:
        names = json.loads(head)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("they are not a list of texts")
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(names):
            raise ValueError(f"a sample is of group {numbers.max():,} of {len(names):,}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ShardError(
            f"the names of the groups in {manifest.where}/{record['file']} cannot be read: {error}",
            "the report could not name them",
            "make the set again with `wasteddp shard --overwrite`",
        ) from error
    return Groups(record["rule"], tuple(names), of_tar)


def _shards(manifest: Manifest) -> list[Shard]:
    """Return the shards of all splits by name, so that the order does not depend on the splits."""
    shards = {shard.tar: shard for split in manifest.splits.values() for shard in split.shards}
    return [shards[tar] for tar in sorted(shards)]
