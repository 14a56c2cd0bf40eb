"""One set to be made: from where, to where, with which options, and the hash that names all of it.

What there is to read: the images of a job with their classes and, if the source or lists say so, their splits.

What of an image goes into a shard: its own bytes, or a JPEG made of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wasteddp.data.decoding.decode import DEFAULT_QUALITY, reencode
from wasteddp.data.manifest import LeftOut
from wasteddp.errors import SourceError, storage
from wasteddp.sharding import duplicates, scan, splits
from wasteddp.sharding.sources.archives import Source, open_source
from wasteddp.sharding.sources.layout import Layout, Picture, check_classes, read_folders, read_table
from wasteddp.sharding.writer import Sample


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
    near_duplicate_distance: int = duplicates.DEFAULT_DISTANCE
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
            ("--near-duplicate-distance", self.near_duplicate_distance, 0, duplicates.MAX_DISTANCE),
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


def list_images(job: Job, work: Path) -> Listing:
    """Opens the source of a job; `work` may take what has to be unpacked.

    Raises:
        SourceError: no images, classes or lists that contradict each other, too many images that a list misses.
    """
    source: Source
    if job.source.suffix.lower() == ".csv" and job.source.is_file():
        source, layout = read_table(job.source, classes=job.classes)
    else:
        source = open_source(job.source, work_folder=work)
        layout = read_folders(source, job.source, classes=job.classes)
    if layout.is_split and (job.split_files or job.options.fractions):
        raise SourceError(
            f"{job.source} is already split into {', '.join(sorted({p.split for p in layout.pictures}))}",
            "a second split would mix what somebody kept apart",
            "leave out --fractions and --split-files, or give the class folders without the split folders",
        )
    if job.split_files and job.options.fractions:
        raise SourceError(
            "both list files and fractions are given", "an image would have two splits", "leave out one of them"
        )
    if job.bins and set(job.bins) != set(layout.classes):
        raise SourceError(
            f"bins are given for {', '.join(sorted(job.bins))}; the classes are {', '.join(layout.classes)}",
            "an image could be classified and still have no bin",
            "give one bin for each class",
        )
    if layout.ignored:
        shown = ", ".join(layout.ignored[:5]) + (", ..." if len(layout.ignored) > 5 else "")
        print(f"{len(layout.ignored)} file(s) are no images in a class folder and are passed over: {shown}")
    if not job.split_files:
        return Listing(source, layout)
    layout, not_listed, missing = splits.apply_lists(layout, splits.read_list_files(job.split_files))
    check_classes({picture.class_name for picture in layout.pictures}, layout.classes, "the lists of the splits")
    absent = [LeftOut(line.name, "unreadable", f"listed in {line.place}, but not there") for line in missing]
    if len(absent) > scan.max_unusable(len(layout.pictures) + len(absent), job.options.max_left_out):
        raise scan.too_many(absent, len(layout.pictures) + len(absent), job.options.max_left_out)
    return Listing(source, layout, (*absent, *(LeftOut(path, "not_listed", "no list names it") for path in not_listed)))


def load_sample(
    source: Source, picture: Picture, record: scan.Scan, classes: Sequence[str], options: Options
) -> Sample:
    """Reads an image again, proves that it is the one that was scanned, and re-encodes it if it cannot stay."""
    path = picture.file.path
    with storage("reading an image again", path):
        data = source.read(path)
    sha256 = hashlib.sha256(data).digest()
    if sha256 != record["sha256"].tobytes():
        raise SourceError(
            f"{path} changed while it was being sharded", "what was proved of it no longer holds", "start again"
        )
    if not stays(record, options):
        data = reencode(data, max_side_px=options.max_side_px, quality=options.quality)
        sha256 = hashlib.sha256(data).digest()
    label = classes.index(picture.class_name)
    return Sample(data, sha256, label, picture.class_name, path)


def stays(record: scan.Scan, options: Options) -> bool:
    """Whether the image's own bytes go into the shard."""
    too_large = options.max_side_px is not None and max(record["height"], record["width"]) > options.max_side_px
    return bool(record["is_plain"]) and not too_large
