"""Decide which scanned images go into which split: drop copies, choose splits, count near-duplicates.

The result depends only on the job, the listing and the records, so every machine selects the same images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wasteddp.data.manifest import FOLD_PREFIX, LeftOut
from wasteddp.errors import SourceError, visible
from wasteddp.sharding import duplicates, groups, splits
from wasteddp.sharding.compare import recorded_groups, recorded_splits
from wasteddp.sharding.duplicates import Near, leave_out_copies
from wasteddp.sharding.job import Job, Listing, Options
from wasteddp.sharding.scan import ScanResult
from wasteddp.sharding.sources.layout import SPLITS, SourceImage


class _Chosen(NamedTuple):
    split_of: list[str]
    near: Near
    largest: int = 1  # images that had to stay together


@dataclass(frozen=True, slots=True)
class Selection:
    """The selected images, as indices into the listing."""

    members: Mapping[str, list[int]]  # of each split, in the order of its shards: by content hash
    left_out: tuple[LeftOut, ...]  # sorted by source
    near_duplicates: Mapping[str, Any]  # for the manifest

    @property
    def num_samples(self) -> int:
        return sum(len(members) for members in self.members.values())


def select(job: Job, listing: Listing, scanned: ScanResult) -> Selection:
    """Select the images of the set and the split of each.

    Raises:
        SourceError: a class has no usable image, or the options contradict the listing.
    """
    images, classes, records = listing.layout.images, listing.layout.classes, scanned.records
    listed = {image.class_name for image in images}
    classes = tuple(name for name in classes if name in listed)  # others may lack images
    usable = np.flatnonzero(records["problem"] == 0).tolist()
    check_usable(classes, images, usable, scanned.left_out(images))
    held, _ = _hold_out(job.options, [images[i] for i in usable])
    chosen, copies = leave_out_copies(
        [replace(images[i], split="test") if images[i].group in held else images[i] for i in usable],
        [records["sha256"][i].tobytes() for i in usable],
        keep_conflicts=job.options.keep_conflicts,
    )
    kept = [usable[i] for i in chosen]
    check_usable(classes, images, kept, copies)
    hashes = {i: records["sha256"][i].tobytes() for i in kept}

    def find_near(split_of: Sequence[str]) -> Near:
        names = split_names(job.options.folds)
        kinds = np.array([names.index(split) for split in split_of], np.int64)
        bits64, bits256 = records["bits64"][kept], records["bits256"][kept]
        return duplicates.find_near(
            bits64, bits256, kinds, ~np.eye(len(names), dtype=bool), distance=job.options.near_duplicate_distance
        )

    old = recorded_splits(job.extends) if job.extends else {}
    paths = [images[i].file.path for i in kept]
    old_groups = recorded_groups(job.extends) if job.extends and job.options.group_rule else {}
    own = [
        old.get(hashes[i].hex()) or old.get(path) or old_groups.get(images[i].group, "")
        for i, path in zip(kept, paths, strict=True)
    ]
    found = _choose_splits(
        job.options,
        [images[i] for i in kept],
        list(hashes.values()),
        find_near,
        {number: split for number, split in enumerate(own) if split},
    )
    members = {
        split: sorted((i for i, s in zip(kept, found.split_of, strict=True) if s == split), key=lambda i: hashes[i])
        for split in split_names(job.options.folds)
        if split in found.split_of
    }
    left_out = [*listing.left_out, *scanned.left_out(images), *copies]
    return Selection(
        members=members,
        left_out=tuple(sorted(left_out, key=lambda left: left.source)),
        near_duplicates=_near_report(job.options, [images[i] for i in kept], found),
    )


def split_names(num_folds: int) -> tuple[str, ...]:
    """Return the splits of a set, in their order."""
    return (*groups.fold_names(num_folds), "test") if num_folds else SPLITS


def check_usable(
    classes: Sequence[str], images: Sequence[SourceImage], kept: Sequence[int], left_out: Sequence[LeftOut]
) -> None:
    """Check that each class has an image among those that are `kept`.

    Raises:
        SourceError: a class has none.
    """
    counts = Counter(images[i].class_name for i in kept)
    for name in classes:
        if not counts[name]:
            own = {image.file.path for image in images if image.class_name == name}
            reasons = [f"{left.source}: {left.reason}: {left.detail}" for left in left_out if left.source in own]
            raise SourceError(
                f"the class {visible(name)} has no usable image; left out: {'; '.join(reasons[:5]) or 'none'}",
                "the model cannot learn this class",
                "add or repair images of it, or remove its folder",
            )


def _choose_splits(
    options: Options,
    images: Sequence[SourceImage],
    hashes: Sequence[bytes],
    find_near: Callable[[Sequence[str]], Near],
    old: Mapping[int, str],
) -> _Chosen:
    """Return the split of each kept image, its own or one chosen by fractions, and the near-duplicates."""
    if images[0].split:
        if options.group_near_duplicates and not options.folds:
            raise SourceError(
                "--group-near-duplicates was given for images that are already split",
                "moving images would change the given splits",
                "leave it out (pairs across splits are counted in any case), or split by fractions",
            )
        own = [image.split for image in images]
        if not options.folds:
            return _Chosen(own, find_near(own))
        near, joined = _join(options, images, find_near)
        own = _choose_folds(options, images, hashes, joined, own, old)
        return _Chosen(own, find_near(own))
    fractions, classes = options.fractions or splits.DEFAULT_FRACTIONS, [image.class_name for image in images]
    held, rest = _hold_out(options, images)
    if options.leave_out:
        fractions = splits.without_test(fractions)
    near, joined = _join(options, images, find_near)
    chosen = ["test"] * len(images)
    kept = {
        i: "train" if old[image].startswith(FOLD_PREFIX) else old[image] for i, image in enumerate(rest) if image in old
    }
    inside = _split(options, [classes[i] for i in rest], [hashes[i] for i in rest], joined[rest], fractions, kept)
    for image, split in zip(rest, inside, strict=True):
        chosen[image] = split
    largest = _largest(joined)
    if near or options.split_rule == "stratified":
        has_groups, least = bool(options.group_rule), 0 if options.folds else options.least_per_class
        splits.check_sizes(
            inside, [classes[i] for i in rest], fractions, largest_chain=largest, least=least, has_groups=has_groups
        )
    if options.folds:
        chosen = _choose_folds(options, images, hashes, joined, chosen, old)
    is_counted = near is not None and not old and not held
    return _Chosen(chosen, near if is_counted and near else find_near(chosen), largest)


def _split(
    options: Options,
    classes: Sequence[str],
    hashes: Sequence[bytes],
    joined: npt.NDArray[np.int64],
    fractions: tuple[float, float, float],
    kept: Mapping[int, str],
) -> list[str]:
    """Return the split of each image by the rule of the options."""
    if options.split_rule != "stratified":
        chosen = splits.by_fractions(hashes, fractions, seed=options.split_seed)
        is_joined = options.group_near_duplicates or options.group_rule
        return splits.group_splits(chosen, hashes, joined) if is_joined else chosen
    if not options.group_rule:
        return splits.stratified(classes, hashes, joined, fractions, seed=options.split_seed, kept=kept)
    members = _shuffled(hashes, joined, options.split_seed)
    of_image = groups.divide_images(members, classes, fractions, SPLITS, kept=kept)
    return [of_image[image] for image in range(len(classes))]


def _choose_folds(
    options: Options,
    images: Sequence[SourceImage],
    hashes: Sequence[bytes],
    joined: npt.NDArray[np.int64],
    split_of: Sequence[str],
    old: Mapping[int, str],
) -> list[str]:
    """Return the fold of each image of train and val. The others keep their split."""
    inside = [image for image, split in enumerate(split_of) if split != "test"]
    members = _shuffled([hashes[i] for i in inside], joined[inside], options.split_seed)
    names = groups.fold_names(options.folds)
    fold_of = groups.divide_images(
        members,
        [images[i].class_name for i in inside],
        [1 / options.folds] * options.folds,
        names,
        kept={i: old[image] for i, image in enumerate(inside) if old.get(image) in names},
    )
    groups.check_folds(fold_of, options.folds, len(members))
    chosen = list(split_of)
    for i, image in enumerate(inside):
        chosen[image] = fold_of[i]
    return chosen


def _shuffled(hashes: Sequence[bytes], joined: npt.NDArray[np.int64], seed: int) -> list[list[int]]:
    """Return the images of each group, in an order that depends on the seed and the smallest content hash of each."""
    members = splits.members_of(hashes, joined)
    return sorted(members, key=lambda images: splits.unit_interval(seed, hashes[images[0]]))


def _join(
    options: Options, images: Sequence[SourceImage], find_near: Callable[[Sequence[str]], Near]
) -> tuple[Near | None, npt.NDArray[np.int64]]:
    """Return the near-duplicates, if they stay together, and a number for each set of images that stays together."""
    one_split = [split_names(options.folds)[0]] * len(images)
    near = find_near(one_split) if options.group_near_duplicates else None
    joined = near.chains_N if near else np.arange(len(images))
    return near, duplicates.join_groups(joined, groups.numbers_of(images)) if options.group_rule else joined


def _hold_out(options: Options, images: Sequence[SourceImage]) -> tuple[set[str], list[int]]:
    """Return the groups that are left out for the test split, and the images of all others."""
    names = {image.group for image in images}
    held = groups.find_left_out(names, options.leave_out, options.group_rule)
    return held, [i for i, image in enumerate(images) if image.group not in held]


def _largest(chains: npt.NDArray[np.int64]) -> int:
    return int(np.bincount(chains).max())


def _near_report(options: Options, images: Sequence[SourceImage], found: _Chosen) -> dict[str, Any]:
    """Return the near-duplicates in different splits: how many pairs, and the pairs by name, nearest first."""
    split_of, near, names = found.split_of, found.near, split_names(options.folds)
    report = {
        "method": "64 DCT signs, confirmed by 256",
        "distance": options.near_duplicate_distance,
        "confirmed_distance": duplicates.CONFIRMED_DISTANCE,
        "grouped": options.group_near_duplicates,
        "num_pairs": near.num_pairs,
        "across_splits": {
            f"{names[one]}-{names[other]}": {
                "pairs": int(near.pairs_KK[one, other]),
                f"{names[other]}_images": int(near.images_KK[one, other]),
            }
            for one, other in combinations(range(len(names)), 2)
        },
        "pairs": [
            [images[i].file.path, split_of[i], images[j].file.path, split_of[j], bits]
            for (i, j), bits in zip(near.pairs.tolist(), near.distances.tolist(), strict=True)
        ],
    }
    if options.split_rule == "stratified":
        report["largest_chain"] = found.largest if options.group_rule else _largest(near.chains_N)
    if not near.is_complete:
        report["numbers_are"] = "at least: images with more near-duplicates were not compared further"
    return report
