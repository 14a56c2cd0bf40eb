"""Decide which scanned images go into which split: drop copies, choose splits, count near-duplicates.

The result depends only on the job, the listing and the records, so every machine selects the same images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.data.manifest import LeftOut
from wasteddp.errors import SourceError
from wasteddp.sharding import duplicates, splits
from wasteddp.sharding.compare import recorded_splits
from wasteddp.sharding.duplicates import Near, leave_out_copies
from wasteddp.sharding.job import Job, Listing, Options
from wasteddp.sharding.scan import ScanResult
from wasteddp.sharding.sources.layout import SPLITS, SourceImage


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
    check_usable(classes, [images[i] for i in usable], scanned.left_out(images))
    chosen, copies = leave_out_copies(
        [images[i] for i in usable],
        [records["sha256"][i].tobytes() for i in usable],
        keep_conflicts=job.options.keep_conflicts,
    )
    kept = [usable[i] for i in chosen]
    check_usable(classes, [images[i] for i in kept], copies)
    hashes = {i: records["sha256"][i].tobytes() for i in kept}

    def find_near(split_of: Sequence[str]) -> Near:
        kinds = np.array([SPLITS.index(split) for split in split_of], np.int64)
        bits64, bits256 = records["bits64"][kept], records["bits256"][kept]
        return duplicates.find_near(
            bits64, bits256, kinds, ~np.eye(len(SPLITS), dtype=bool), distance=job.options.near_duplicate_distance
        )

    old = recorded_splits(job.extends) if job.extends else {}
    paths = [images[i].file.path for i in kept]
    own = [old.get(hashes[i].hex()) or old.get(path, "") for i, path in zip(kept, paths, strict=True)]
    split_of, near = _choose_splits(
        job.options,
        [images[i] for i in kept],
        list(hashes.values()),
        find_near,
        {number: split for number, split in enumerate(own) if split},
    )
    members = {
        split: sorted((i for i, s in zip(kept, split_of, strict=True) if s == split), key=lambda i: hashes[i])
        for split in SPLITS
        if split in split_of
    }
    left_out = [*listing.left_out, *scanned.left_out(images), *copies]
    return Selection(
        members=members,
        left_out=tuple(sorted(left_out, key=lambda left: left.source)),
        near_duplicates=_near_report(job.options, [images[i] for i in kept], split_of, near),
    )


def check_usable(classes: Sequence[str], images: Sequence[SourceImage], left_out: Sequence[LeftOut]) -> None:
    """Check that each class has an image.

    Raises:
        SourceError: a class has none.
    """
    counts = Counter(image.class_name for image in images)
    for name in classes:
        if not counts[name]:
            reasons = [f"{left.source}: {left.reason}: {left.detail}" for left in left_out]
            raise SourceError(
                f"the class {name} has no usable image; left out: {'; '.join(reasons[:5]) or 'none'}",
                "the model cannot learn this class",
                "add or repair images of it, or remove its folder",
            )


def _choose_splits(
    options: Options,
    images: Sequence[SourceImage],
    hashes: Sequence[bytes],
    find_near: Callable[[Sequence[str]], Near],
    old: Mapping[int, str],
) -> tuple[list[str], Near]:
    """Return the split of each kept image, its own or one chosen by fractions, and the near-duplicates."""
    if images[0].split:
        if options.group_near_duplicates:
            raise SourceError(
                "--group-near-duplicates was given for images that are already split",
                "moving images would change the given splits",
                "leave it out (pairs across splits are counted in any case), or split by fractions",
            )
        own = [image.split for image in images]
        return own, find_near(own)
    fractions, classes = options.fractions or splits.DEFAULT_FRACTIONS, [image.class_name for image in images]
    near, chains = None, np.arange(len(images))
    if options.group_near_duplicates:
        near = find_near(["train"] * len(images))
        chains = near.chains_N
    if options.split_rule == "stratified":
        chosen = splits.stratified(classes, hashes, chains, fractions, seed=options.split_seed, kept=old)
    else:
        chosen = splits.by_fractions(hashes, fractions, seed=options.split_seed)
        chosen = splits.group_splits(chosen, hashes, chains) if near else chosen
    if near or options.split_rule == "stratified":
        splits.check_sizes(chosen, classes, fractions, largest_chain=_largest(chains), least=options.least_per_class)
    return chosen, near if near and not old else find_near(chosen)


def _largest(chains: npt.NDArray[np.int64]) -> int:
    return int(np.bincount(chains).max())


def _near_report(
    options: Options, images: Sequence[SourceImage], split_of: Sequence[str], near: Near
) -> dict[str, Any]:
    """Return the near-duplicates in different splits: how many pairs, and the pairs by name, nearest first."""
    report = {
        "method": "64 DCT signs, confirmed by 256",
        "distance": options.near_duplicate_distance,
        "confirmed_distance": duplicates.CONFIRMED_DISTANCE,
        "grouped": options.group_near_duplicates,
        "num_pairs": near.num_pairs,
        "across_splits": {
            f"{SPLITS[one]}-{SPLITS[other]}": {
                "pairs": int(near.pairs_KK[one, other]),
                f"{SPLITS[other]}_images": int(near.images_KK[one, other]),
            }
            for one, other in ((0, 1), (0, 2), (1, 2))
        },
        "pairs": [
            [images[i].file.path, split_of[i], images[j].file.path, split_of[j], bits]
            for (i, j), bits in zip(near.pairs.tolist(), near.distances.tolist(), strict=True)
        ],
    }
    if options.split_rule == "stratified":
        report["largest_chain"] = _largest(near.chains_N)
    if not near.is_complete:
        report["numbers_are"] = "at least: images with more near-duplicates were not compared further"
    return report
