"""Decide which scanned images go into which split: drop copies, choose splits, count near-duplicates.

The result depends only on the job, the listing and the records, so every machine selects the same images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wasteddp.data.manifest import LeftOut
from wasteddp.errors import SourceError
from wasteddp.sharding import duplicates, splits
from wasteddp.sharding.duplicates import NearPairs, leave_out_copies
from wasteddp.sharding.job import Job, Listing, Options
from wasteddp.sharding.scan import ScanResult
from wasteddp.sharding.sources.layout import SPLITS, SourceImage

_MAX_PAIRS_LISTED = 10_000


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
    usable = np.flatnonzero(records["problem"] == 0).tolist()
    check_usable(classes, [images[i] for i in usable], scanned.left_out(images))
    chosen, copies = leave_out_copies(
        [images[i] for i in usable],
        [records["sha256"][i].tobytes() for i in usable],
        keep_conflicts=job.options.keep_conflicts,
    )
    kept = [usable[i] for i in chosen]
    check_usable(classes, [images[i] for i in kept], copies)
    near = duplicates.find_near_pairs(
        records["bits64"][kept], records["bits256"][kept], distance=job.options.near_duplicate_distance
    )
    hashes = {i: records["sha256"][i].tobytes() for i in kept}
    split_of = _choose_splits(job.options, [images[i] for i in kept], list(hashes.values()), near)
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
    options: Options, images: Sequence[SourceImage], hashes: Sequence[bytes], near: NearPairs
) -> list[str]:
    """Return the split of each kept image: its own, or one chosen by fractions."""
    if images[0].split:
        if options.group_near_duplicates:
            raise SourceError(
                "--group-near-duplicates was given for images that are already split",
                "moving images would change the given splits",
                "leave it out (pairs across splits are counted in any case), or split by fractions",
            )
        return [image.split for image in images]
    chosen = splits.by_fractions(hashes, options.fractions or splits.DEFAULT_FRACTIONS, seed=options.split_seed)
    return splits.group_splits(chosen, hashes, near.pairs) if options.group_near_duplicates else chosen


def _near_report(
    options: Options, images: Sequence[SourceImage], split_of: Sequence[str], near: NearPairs
) -> dict[str, Any]:
    """Return the near-duplicates in different splits: how many pairs, and the pairs by name, nearest first."""
    across = [
        (bits, *sorted((first, second), key=lambda i: SPLITS.index(split_of[i])))
        for (first, second), bits in zip(near.pairs.tolist(), near.distances.tolist(), strict=True)
        if split_of[first] != split_of[second]
    ]
    counts: dict[str, dict[str, int]] = {}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        pairs = [(i, j) for _, i, j in across if (split_of[i], split_of[j]) == (one, other)]
        counts[f"{one}-{other}"] = {"pairs": len(pairs), f"{other}_images": len({j for _, j in pairs})}
    return {
        "method": "64 DCT signs, confirmed by 256",
        "distance": options.near_duplicate_distance,
        "confirmed_distance": duplicates.CONFIRMED_DISTANCE,
        "grouped": options.group_near_duplicates,
        "num_pairs": len(near.pairs),
        "across_splits": counts,
        "pairs": [
            [images[i].file.path, split_of[i], images[j].file.path, split_of[j], bits]
            for bits, i, j in sorted(across)[:_MAX_PAIRS_LISTED]
        ],
    }
