"""Find images that are in two places: in two splits or under two labels of one set, or in two sets.

The same image is found by its bytes, from the indexes alone. Near-duplicates of two sets are found by decoding all
images of both (`duplicates`).
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import combinations, product
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wasteddp.data.dataset import Groups, read_groups
from wasteddp.data.decoding.decode import UndecodableError, check_image
from wasteddp.data.manifest import Index, Manifest, Shard, pad_size, read_index
from wasteddp.data.reader import SplitReader
from wasteddp.errors import ShardError, storage
from wasteddp.files import open_regular, read_at
from wasteddp.parallel import in_order, progress
from wasteddp.sharding.duplicates import PerceptualHash, find_near, perceptual_hash

_MAX_NAMED = 3


class _Samples(NamedTuple):
    """All samples of a split, in their order."""

    manifest: Manifest
    split: str
    records: Index

    @property
    def sha256s(self) -> npt.NDArray[np.void]:
        return np.ascontiguousarray(self.records["sha256"]).view("V32").ravel()

    def name(self, number: int) -> str:
        """Return the split and the key of a sample, from its tar if that is here."""
        offset = int(self.records[number]["offset"]) - BLOCKSIZE
        for shard in self.manifest.splits[self.split].shards:
            if number < shard.num_samples:
                break
            number -= shard.num_samples
        try:
            with open_regular(self.manifest.folder / shard.tar) as file:
                header = tarfile.TarInfo.frombuf(read_at(file.fileno(), BLOCKSIZE, offset), "utf-8", "replace")
            return f"{header.name} in {shard.tar}"
        except (OSError, tarfile.HeaderError):
            return f"sample {number} of {shard.tar}"


def _samples(manifest: Manifest, read: Callable[[Shard], Index]) -> list[_Samples]:
    return [
        _Samples(manifest, split.name, np.concatenate([read(shard) for shard in split.shards]))
        for split in manifest.splits.values()
        if split.num_samples
    ]


def recorded_splits(manifest: Manifest) -> dict[str, str]:
    """Return the split of each image of a set, by its sha256 in hex and by its path in the source."""
    split_of: dict[str, str] = {}
    for split in manifest.splits.values():
        for shard in split.shards:
            index = read_index(manifest.folder, shard)
            with (
                storage("reading the paths of a set", manifest.folder),
                open_regular(manifest.folder / shard.tar) as file,
            ):
                for record in index:
                    split_of[_source_of(file.fileno(), record, manifest.folder / shard.tar)] = split.name
            split_of |= dict.fromkeys((row.tobytes().hex() for row in index["sha256"]), split.name)
    return split_of


def recorded_groups(manifest: Manifest) -> dict[str, str]:
    """Return the split of each group of a set; of several, the last. A set without groups has none."""
    groups = read_groups(manifest)
    return {name: split for split, names in _groups_by_split(manifest, groups).items() for name in names}


def _groups_by_split(manifest: Manifest, groups: Groups | None) -> dict[str, set[str]]:
    if groups is None:
        return {}
    numbers = {
        split.name: np.unique(groups.of_split(manifest, split.name)).tolist()
        for split in manifest.splits.values()
        if split.num_samples
    }
    return {split: {groups.names[number] for number in some} for split, some in numbers.items()}


def find_divided(manifest: Manifest, groups: Groups | None) -> list[str]:
    """Describe the groups of a set that are in two splits."""
    names = _groups_by_split(manifest, groups)
    return [
        f"warning: {len(both):,} group(s) are in {one} and in {other}: {', '.join(sorted(both)[:_MAX_NAMED])}"
        for one, other in combinations(names, 2)
        if (both := names[one] & names[other])
    ]


def _shared_groups(first: Manifest, second: Manifest) -> Iterator[tuple[str, bool]]:
    """Describe the groups that two sets share, if they were found by one rule, and whether they leak."""
    ones, others = read_groups(first), read_groups(second)
    if ones is None or others is None or ones.rule != others.rule or first.sha256 == second.sha256:
        return
    for (one, names), (other, also) in product(
        _groups_by_split(first, ones).items(), _groups_by_split(second, others).items()
    ):
        if both := names & also:
            yield (
                f"warning: {len(both):,} group(s) by {ones.rule} of {second.where} {other} are also in {first.where} "
                f"{one}: {', '.join(sorted(both)[:_MAX_NAMED])}",
                {one, other} == {"train", "test"},
            )


def _source_of(descriptor: int, record: np.void, tar: Path) -> str:
    """Return the path that `shard` wrote beside an image, in the member after it."""
    begin = int(record["offset"]) + pad_size(int(record["length"]))
    content = read_at(descriptor, 64 * BLOCKSIZE, begin)
    try:
        header = tarfile.TarInfo.frombuf(content[:BLOCKSIZE], "utf-8", "replace")
        return str(json.loads(content[BLOCKSIZE : BLOCKSIZE + header.size])["source"])
    except (tarfile.HeaderError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(
            f"{tar} has no readable label after byte {begin:,}: {error}",
            "it is not known in which split an image of this set was",
            "find the damage with wasteddp verify, and restore the set from a copy",
        ) from error


def find_repeats(manifest: Manifest, read: Callable[[Shard], Index] | None = None) -> list[str]:
    """Describe the images of a set that are in two splits or under two labels, byte for byte.

    Args:
        read: returns the index of a shard; by default from the set's folder.
    """
    splits = _samples(manifest, read or (lambda shard: read_index(manifest.folder, shard, check=False)))
    lines = [line for one, other in combinations(splits, 2) for line in _same(one, other)]
    if not splits:
        return lines
    everything = np.concatenate([samples.sha256s for samples in splits])
    labels = np.concatenate([samples.records["label"] for samples in splits])
    _, content = np.unique(everything, return_inverse=True)
    labelled = np.unique(np.stack([content, labels], axis=1), axis=0)
    twice = labelled[np.flatnonzero(labelled[1:, 0] == labelled[:-1, 0]), 0]
    if len(twice):
        places = [(samples, number) for samples in splits for number in range(len(samples.records))]
        named = [
            " and ".join(
                f"{samples.name(number)} ({manifest.classes[samples.records['label'][number]]})"
                for samples, number in (places[i] for i in np.flatnonzero(content == one)[:_MAX_NAMED])
            )
            for one in np.unique(twice)[:_MAX_NAMED]
        ]
        lines += [f"warning: {len(np.unique(twice)):,} image(s) have several labels: {'; '.join(named)}"]
    return lines


def _same(one: _Samples, other: _Samples) -> Iterator[str]:
    """Describe the images of `other` that are also in `one`."""
    numbers = np.flatnonzero(np.isin(other.sha256s, one.sha256s))
    if len(numbers):
        named = [
            f"{one.name(int(np.flatnonzero(one.sha256s == other.sha256s[number])[0]))} = {other.name(number)}"
            for number in numbers[:_MAX_NAMED].tolist()
        ]
        yield (
            f"warning: {len(numbers):,} image(s) of {_where(other, one)} are also in {_where(one, other)}, byte for "
            f"byte: {'; '.join(named)}"
        )


def _where(samples: _Samples, other: _Samples) -> str:
    """Return the split, and the set where there are two."""
    return samples.split if samples.manifest is other.manifest else f"{samples.manifest.where} {samples.split}"


class Comparison(NamedTuple):
    lines: list[str]
    leaks: bool  # an image or a group of one set's train is in the other's test, or nearly


def compare(first: Manifest, second: Manifest, *, workers: int, distance: int) -> Comparison:
    """Find the images of two sets that are the same, byte for byte or nearly.

    Raises:
        ShardError: an index or a tar is missing or damaged.
    """
    ones, others = (
        _samples(manifest, lambda shard, folder=manifest.folder: read_index(folder, shard))  # type: ignore[misc]
        for manifest in (first, second)
    )
    splits = [*ones, *others]
    lines: list[str] = []
    leaks = False
    for one, other in product(ones, others):
        found = list(_same(one, other))
        lines += found
        leaks |= bool(found) and {one.split, other.split} == {"train", "test"}
    for line, is_leak in _shared_groups(first, second):
        lines.append(line)
        leaks |= is_leak
    hashes, kinds, numbers, num_unread = _hash_all(splits, workers)
    is_first = np.arange(len(splits)) < len(ones)
    bits64 = np.array([h.bits64 for h in hashes], np.uint64)
    bits256 = np.frombuffer(b"".join(h.bits256 for h in hashes), np.uint8).reshape(-1, 32)
    near = find_near(bits64, bits256, kinds, is_first[:, None] != is_first[None, :], distance=distance)
    pair_kinds = kinds[near.pairs]
    for i, j in product(range(len(ones)), range(len(ones), len(splits))):
        if count := int(near.images_KK[i, j]):
            chosen = near.pairs[(pair_kinds == (i, j)).all(axis=1)][:_MAX_NAMED].tolist()
            named = [f"{splits[i].name(numbers[a])} ~ {splits[j].name(numbers[b])}" for a, b in chosen]
            lines.append(
                f"warning: {'at least ' if not near.is_complete else ''}{count:,} image(s) of "
                f"{_where(splits[j], splits[i])} also show in {_where(splits[i], splits[j])}, identical ones included: "
                f"{'; '.join(named)}"
            )
            leaks |= {splits[i].split, splits[j].split} == {"train", "test"}
    if num_unread:
        lines.append(f"{num_unread:,} image(s) cannot be decoded and were compared byte for byte only")
    return Comparison(lines, leaks)


def _hash_all(
    splits: Sequence[_Samples], workers: int
) -> tuple[list[PerceptualHash], npt.NDArray[np.int64], list[int], int]:
    """Return the hash, the place of its split and its number for each image, and how many cannot be decoded."""
    hashes: list[PerceptualHash] = []
    kinds: list[int] = []
    numbers: list[int] = []
    with progress("reading images", sum(len(samples.records) for samples in splits)) as advance:
        for kind, samples in enumerate(splits):
            with closing(SplitReader(samples.manifest, samples.split)) as reader:

                def hash_one(number: int, reader: SplitReader = reader) -> PerceptualHash | None:
                    data = reader.read(number)
                    try:
                        return perceptual_hash(check_image(data).grey)
                    except UndecodableError:
                        return None

                for number, one in enumerate(in_order(hash_one, range(len(samples.records)), workers=workers)):
                    advance()
                    if one is not None:
                        hashes.append(one)
                        kinds.append(kind)
                        numbers.append(number)
    total = sum(len(samples.records) for samples in splits)
    return hashes, np.array(kinds, np.int64), numbers, total - len(hashes)
