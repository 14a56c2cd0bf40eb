"""One set to be made: from where, to where, with which options, and the hash that names all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wasteddp.data.encode import DEFAULT_QUALITY
from wasteddp.data.manifest import LeftOut
from wasteddp.errors import SourceError
from wasteddp.sharding import near_duplicates, splits
from wasteddp.sharding.sources.archives import Source
from wasteddp.sharding.sources.layout import Layout


@dataclass(frozen=True, slots=True)
class Options:
    """What the content of a set depends on, beside the images. `fractions` None: the default, where any are needed."""

    fractions: tuple[float, float, float] | None = None
    split_seed: int = 0
    max_side_px: int | None = None
    quality: int = DEFAULT_QUALITY
    shard_mb: float = 256.0
    keep_conflicts: bool = False
    group_near_duplicates: bool = False
    near_duplicate_distance: int = near_duplicates.DEFAULT_DISTANCE
    max_left_out: float | None = None

    @property
    def max_shard_bytes(self) -> int:
        return int(self.shard_mb * 1e6)

    def check(self) -> None:
        """Raises `SourceError` for a value out of its range."""
        if self.fractions is not None:
            splits.check_fractions(self.fractions)
        ranges = (
            ("--max-side", self.max_side_px or 16, 16, 65_500),
            ("--quality", self.quality, 1, 100),
            ("--shard-mb", self.shard_mb, 0.001, 1_000_000),
            ("--near-duplicate-distance", self.near_duplicate_distance, 0, near_duplicates.MAX_DISTANCE),
            ("--max-left-out", self.max_left_out or 0, 0, float("inf")),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise SourceError(f"{name} is {value:g}", "no set can be made with it", f"give {low:g} to {high:g}")


@dataclass(frozen=True, slots=True)
class Job:
    """One set to be made: from where, to where, and what is known of it."""

    source: Path
    out: Path
    options: Options = field(default_factory=Options)
    classes: tuple[str, ...] = ()  # in their order; empty: the sorted names
    bins: Mapping[str, str] = field(default_factory=dict)
    split_files: Mapping[str, Path] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)  # goes into the manifest

    def described(self) -> dict[str, Any]:
        """What the manifest says of how the set was made, in JSON's types."""
        described: dict[str, Any] = json.loads(json.dumps(dict(self.recipe) | {"options": asdict(self.options)}))
        return described


@dataclass(frozen=True, slots=True)
class Listing:
    """What there is to read, before any image was read."""

    source: Source
    layout: Layout
    left_out: tuple[LeftOut, ...] = ()  # not listed, or listed and not there


def identity(job: Job, listing: Listing, hashes: Sequence[bytes]) -> str:
    """One hash of all that a set is a function of: each image's content, name, class and split, and the options."""
    digest = hashlib.sha256(json.dumps([job.described(), listing.layout.classes, dict(job.bins)]).encode())
    for picture, sha256 in zip(listing.layout.pictures, hashes, strict=True):
        line = [picture.file.path, picture.class_name, picture.split, sha256.hex()]
        digest.update(json.dumps(line).encode() + b"\n")
    for left in listing.left_out:
        digest.update(json.dumps([left.source, left.reason]).encode() + b"\n")
    return digest.hexdigest()
