"""Check a shard set against its manifest and name all damage: each shard, and inside it each sample."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np

from wasteddp.data.dataset import Groups, read_groups
from wasteddp.data.manifest import (
    INDEX_DTYPE,
    MANIFEST_NAME,
    Index,
    Manifest,
    Shard,
    pad_size,
    parse_index,
    read_index,
    shared_shards,
)
from wasteddp.data.remote.folder import Patience, RemoteFolder
from wasteddp.errors import DamagedShardError, ShardError, WastedError
from wasteddp.files import open_regular, read_at, sha256_of
from wasteddp.parallel import in_order, progress
from wasteddp.sharding.compare import find_divided, find_repeats

_MAX_LABEL_BYTES = 1 << 20
_MAX_NAMED = 50  # samples of one shard; the rest are counted


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked, and the damage found. The set is complete if `damage` is empty."""

    num_shards: int
    num_samples: int
    num_bytes: int
    damage: tuple[str, ...]
    repeats: tuple[str, ...] = ()  # images in two splits or under two labels: no damage


def verify(folder: Path, *, workers: int) -> Verified:
    """Read every byte of every shard, several shards at a time.

    Raises:
        ShardError: there is no manifest, or it has another format.
    """
    manifest = Manifest.load(folder)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    is_own = "inputs_sha256" in manifest.recipe  # written by `wasteddp shard`, not indexed
    damage = shared_shards(manifest)
    with progress("verifying shards", len(shards)) as advance:
        for found in in_order(lambda shard: _damage(folder, shard, is_own=is_own), shards, workers=workers):
            damage += found
            advance()
    damage += [] if damage else _wrong_counts(manifest)
    groups = _read_groups(manifest, damage)
    repeats = [] if damage else [*find_repeats(manifest), *find_divided(manifest, groups)]
    return _verified(shards, damage, repeats)


def verify_remote(url: str, *, workers: int) -> Verified:
    """Verify a set over the network: every byte is fetched and none is kept.

    Raises:
        ShardError: there is no manifest, or the store cannot be reached.
    """
    folder = RemoteFolder(url, Patience())
    try:
        manifest = Manifest.parse(folder.read(MANIFEST_NAME), Path(), url=folder.url)
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        damage = shared_shards(manifest)
        with progress("verifying shards", len(shards)) as advance:
            for found in in_order(lambda shard: _remote_damage(folder, shard), shards, workers=workers):
                damage += found
                advance()

        def read(shard: Shard) -> Index:
            return parse_index(folder.read(shard.index), shard, f"{folder.url}/{shard.index}")

        groups = _read_groups(manifest, damage, folder.read)
        repeats = [] if damage else [*find_repeats(manifest, read), *find_divided(manifest, groups)]
    finally:
        folder.close()
    return _verified(shards, damage, repeats)


def _read_groups(manifest: Manifest, damage: list[str], read: Callable[[str], bytes] | None = None) -> Groups | None:
    """Return the groups of a set; if their file is damaged, add that to `damage`."""
    try:
        return read_groups(manifest, read)
    except WastedError as error:
        damage.append(error.found)
        return None


def _verified(shards: Sequence[Shard], damage: Sequence[str], repeats: Sequence[str]) -> Verified:
    num_samples, num_bytes = sum(s.num_samples for s in shards), sum(s.num_bytes for s in shards)
    return Verified(len(shards), num_samples, num_bytes, tuple(damage), tuple(repeats))


def require_whole(folder: Path | str, verified: Verified) -> None:
    """Check that there is no damage.

    Raises:
        ShardError: there is damage; the message names all of it.
    """
    if verified.damage:
        raise ShardError(
            f"{folder} is damaged:\n    " + "\n    ".join(verified.damage),
            "training would stop at these samples, or learn from changed images",
            "copy the named files again from a good copy, or make the set again with `wasteddp shard --overwrite`",
        )


def _remote_damage(folder: RemoteFolder, shard: Shard) -> list[str]:
    damage = []
    index_bytes = shard.num_samples * INDEX_DTYPE.itemsize
    for name, num_bytes, sha256 in (
        (shard.tar, shard.num_bytes, shard.sha256),
        (shard.index, index_bytes, shard.index_sha256),
    ):
        try:
            with Path(os.devnull).open("wb") as nowhere:
                if folder.copy(name, num_bytes, sha256, nowhere) != sha256:
                    damage.append(f"{name}: another sha256; `wasteddp verify` of a copy names the samples")
        except DamagedShardError as error:
            damage.append(error.found)
    return damage


def _damage(folder: Path, shard: Shard, *, is_own: bool) -> list[str]:
    """Describe what is wrong with one shard; [] if its bytes match the manifest."""
    path = folder / shard.tar
    try:
        index = read_index(folder, shard)
    except ShardError as error:
        return [error.found]
    try:
        num_bytes = path.stat().st_size
        if num_bytes == shard.num_bytes and sha256_of(path) == shard.sha256:
            return []
        samples = _damaged_samples(path, index, is_own=is_own)
    except (OSError, WastedError) as error:
        return [f"{shard.tar}: cannot be read: {getattr(error, 'strerror', None) or error}"]
    size = f"{num_bytes:,} bytes instead of {shard.num_bytes:,}" if num_bytes != shard.num_bytes else "another sha256"
    where = f"{len(samples)} of {shard.num_samples} samples" if samples else "none of its samples, only padding"
    more = [f"... and {len(samples) - _MAX_NAMED} more"] if len(samples) > _MAX_NAMED else []
    return [f"{shard.tar}: {size}; damaged: {where}", *(f"  {line}" for line in [*samples[:_MAX_NAMED], *more])]


def _damaged_samples(path: Path, index: Index, *, is_own: bool) -> list[str]:
    """Name each sample that does not match the index. Headers and labels are checked only in tars of our own."""
    damaged: list[str] = []
    with open_regular(path) as file:
        for number, record in enumerate(index):
            offset, length = int(record["offset"]), int(record["length"])
            image = read_at(file.fileno(), length, offset)
            header = _header(file.fileno(), offset - BLOCKSIZE)
            label = _label(file.fileno(), offset + pad_size(length)) if is_own else {}
            name = f"{header.name.split('.')[0] if header else f'sample {number}'}"
            named = f"{name} ({label.get('source', 'source unknown')})" if is_own else name
            if hashlib.sha256(image).digest() != record["sha256"].tobytes():
                damaged.append(f"{named}: the image")
            elif is_own and (header is None or label.get("label_number") != int(record["label"])):
                damaged.append(f"{named}: its header or label")
    return damaged


def _header(descriptor: int, offset: int) -> tarfile.TarInfo | None:
    """Return the tar header at `offset` if its checksum is right."""
    try:
        return tarfile.TarInfo.frombuf(read_at(descriptor, BLOCKSIZE, offset), "utf-8", "replace")
    except (tarfile.HeaderError, OSError):
        return None


def _label(descriptor: int, offset: int) -> dict[str, Any]:
    """Return the JSON member whose header is at `offset`; {} if either is damaged."""
    header = _header(descriptor, offset)
    try:
        is_small = header is not None and 0 <= header.size <= _MAX_LABEL_BYTES
        label = json.loads(read_at(descriptor, header.size, offset + BLOCKSIZE)) if header and is_small else {}
    except (ValueError, RecursionError):
        return {}
    return label if isinstance(label, dict) else {}


def _wrong_counts(manifest: Manifest) -> list[str]:
    """Name each split whose indexes have other numbers of samples by class than the manifest."""
    wrong: list[str] = []
    for split in manifest.splits.values():
        indexes = [read_index(manifest.folder, shard, check=False)["label"] for shard in split.shards]
        labels = np.concatenate([np.empty(0, np.int32), *indexes])
        if np.bincount(labels, minlength=len(manifest.classes)).tolist() != list(split.samples_per_class):
            wrong.append(f"split {split.name}: its indexes have other numbers of samples by class than the manifest")
    return wrong
