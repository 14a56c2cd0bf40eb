"""Images -> a shard set: the steps from a source to a manifest, in order. Each step's how is in a module of its own.

    list -> read and prove -> drop copies -> choose splits -> count near-duplicates -> write tars -> write manifest

All that this leaves behind while it works is in `.sharding/` inside the set's folder; the manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wasteddp import __version__
from wasteddp.data import intake, near_duplicates, splits
from wasteddp.data.duplicates import leave_out_copies
from wasteddp.data.encoding import DEFAULT_QUALITY, reencode
from wasteddp.data.layout import SPLITS, Layout, Picture, check_classes, read_folders, read_table
from wasteddp.data.manifest import MANIFEST_NAME, LeftOut, Manifest, Split
from wasteddp.data.near_duplicates import NearPairs
from wasteddp.data.progress import progress
from wasteddp.data.set_folder import check_files, clear_the_way, remove_own_files, work_folder
from wasteddp.data.shard_writer import Sample, ShardJournal, write_split
from wasteddp.data.sources import Source, open_source
from wasteddp.errors import ShardError, SourceError, storage

TOOL = f"wasteddp {__version__}"
_MAX_PAIRS_LISTED = 10_000


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


@dataclass(frozen=True, slots=True)
class _Inputs:
    source: Source
    layout: Layout
    left_out: tuple[LeftOut, ...] = ()  # before any image was read: not listed, or listed and not there


def make_shards(job: Job, *, workers: int, overwrite: bool = False) -> Manifest:
    """Makes the set, or finishes it, or finds that it is made already.

    Raises:
        SourceError: the images cannot become a set; ShardError: the folder holds another set; StorageError.
    """
    started = time.monotonic()
    job.options.check()
    with work_folder(job.out) as work:
        inputs = _list_inputs(job, work)
        num_images = len(inputs.layout.pictures)
        if (job.out / MANIFEST_NAME).exists() and not overwrite:
            hashes = list(intake.fingerprints(inputs.source, inputs.layout.pictures, workers=workers))
            return _already_made(job, _identity(job, inputs, hashes), num_images)
        clear_the_way(job.out, work, overwrite=overwrite)
        journal = work / "scan.jsonl"
        continues = journal.exists()  # then a rate would count images that an earlier start has read
        scanned = intake.scan(
            inputs.source, inputs.layout.pictures, workers=workers, journal=journal, limit=job.options.max_left_out
        )
        manifest = _make(job, inputs, scanned, work, workers=workers)
        elapsed_s = time.monotonic() - started
        rate = "continued an earlier start" if continues else f"{num_images / elapsed_s:,.0f} images/s"
        print(f"{num_images:,} images in {elapsed_s:.1f} s: {rate}", flush=True)
    return manifest


def _make(job: Job, inputs: _Inputs, scanned: intake.ScanResult, work: Path, *, workers: int) -> Manifest:
    """Everything behind the scan; from here on the result depends on `job`, the listing and the records alone."""
    pictures, classes, records = inputs.layout.pictures, inputs.layout.classes, scanned.records
    hashes = [row.tobytes() for row in records["sha256"]]
    usable = np.flatnonzero(records["problem"] == 0).tolist()
    check_usable(classes, [pictures[i] for i in usable], scanned.left_out(pictures))
    chosen, copies = leave_out_copies(
        [pictures[i] for i in usable], [hashes[i] for i in usable], keep_conflicts=job.options.keep_conflicts
    )
    kept = [usable[i] for i in chosen]
    check_usable(classes, [pictures[i] for i in kept], copies)
    near = near_duplicates.find_near_pairs(
        records["bits64"][kept], records["bits256"][kept], distance=job.options.near_duplicate_distance
    )
    split_of = _choose_splits(job.options, [pictures[i] for i in kept], [hashes[i] for i in kept], near)
    near_report = _near_report(job.options, [pictures[i] for i in kept], split_of, near)
    identity = _identity(job, inputs, hashes)
    made = {}
    with storage("writing shards", job.out), progress("writing shards", len(kept)) as advance:
        shard_journal = ShardJournal(work / "shards.txt", identity)
        for split in (name for name in SPLITS if name in split_of):
            members = sorted((i for i, s in zip(kept, split_of, strict=True) if s == split), key=lambda i: hashes[i])
            shards = write_split(
                split,
                members,
                lambda i: _load(inputs.source, pictures[i], records[i], classes, job.options),
                folder=job.out,
                journal=shard_journal,
                max_bytes=int(job.options.shard_mb * 1e6),
                workers=workers,
                advance=advance,
            )
            counts = Counter(pictures[i].class_name for i in members)
            made[split] = Split(split, shards, tuple(counts[name] for name in classes))
    left_out = [*inputs.left_out, *scanned.left_out(pictures), *copies]
    manifest = Manifest(
        folder=job.out,
        name=job.out.resolve().name,
        classes=classes,
        splits=made,
        bins=dict(job.bins),
        left_out=tuple(sorted(left_out, key=lambda left: left.source)),
        near_duplicates=near_report,
        recipe=_description(job) | {"inputs_sha256": identity},
        tool=TOOL,
    )
    remove_own_files(job.out, keep={f for s in made.values() for shard in s.shards for f in (shard.tar, shard.index)})
    manifest.save()
    return Manifest.load(job.out)


def _list_inputs(job: Job, work: Path) -> _Inputs:
    """What there is to read, with classes and, if the source or lists say so, splits."""
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
        return _Inputs(source, layout)
    layout, not_listed, missing = splits.apply_lists(layout, splits.read_list_files(job.split_files))
    check_classes({picture.class_name for picture in layout.pictures}, layout.classes, "the lists of the splits")
    absent = [LeftOut(line.name, "unreadable", f"listed in {line.place}, but not there") for line in missing]
    if len(absent) > intake.max_unusable(len(layout.pictures) + len(absent), job.options.max_left_out):
        raise intake.too_many(absent, len(layout.pictures) + len(absent), job.options.max_left_out)
    return _Inputs(source, layout, (*absent, *(LeftOut(path, "not_listed", "no list names it") for path in not_listed)))


def check_usable(classes: Sequence[str], pictures: Sequence[Picture], left_out: Sequence[LeftOut]) -> None:
    """Raises `SourceError` if a class has lost all its images."""
    counts = Counter(picture.class_name for picture in pictures)
    for name in classes:
        if not counts[name]:
            reasons = [f"{left.source}: {left.reason}: {left.detail}" for left in left_out]
            raise SourceError(
                f"the class {name} has no usable image; left out: {'; '.join(reasons[:5]) or 'none'}",
                "a class without images cannot be learned",
                "add or repair images of it, or remove its folder",
            )


def _choose_splits(
    options: Options, pictures: Sequence[Picture], hashes: Sequence[bytes], near: NearPairs
) -> list[str]:
    """The split of each image that is kept: its own, or by fractions."""
    if pictures[0].split:
        if options.group_near_duplicates:
            raise SourceError(
                "--group-near-duplicates was given for images that are already split",
                "moving images would make it another split than the one that was given",
                "leave it out (pairs across splits are counted in any case), or split by fractions",
            )
        return [picture.split for picture in pictures]
    chosen = splits.by_fractions(hashes, options.fractions or splits.DEFAULT_FRACTIONS, seed=options.split_seed)
    return splits.group_splits(chosen, hashes, near.pairs) if options.group_near_duplicates else chosen


def _near_report(
    options: Options, pictures: Sequence[Picture], split_of: Sequence[str], near: NearPairs
) -> dict[str, Any]:
    """Pairs of near-duplicates that straddle splits: counts, and the pairs by name, nearest first."""
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
        "confirmed_distance": near_duplicates.CONFIRMED_DISTANCE,
        "grouped": options.group_near_duplicates,
        "num_pairs": len(near.pairs),
        "across_splits": counts,
        "pairs": [
            [pictures[i].file.path, split_of[i], pictures[j].file.path, split_of[j], bits]
            for bits, i, j in sorted(across)[:_MAX_PAIRS_LISTED]
        ],
    }


def _load(source: Source, picture: Picture, record: intake.Scan, classes: Sequence[str], options: Options) -> Sample:
    """Reads an image again, proves that it is the one that was scanned, and re-encodes it if it cannot stay."""
    path = picture.file.path
    with storage("reading an image again", path):
        data = source.read(path)
    sha256 = hashlib.sha256(data).digest()
    if sha256 != record["sha256"].tobytes():
        raise SourceError(
            f"{path} changed while it was being sharded", "what was proved of it no longer holds", "start again"
        )
    too_large = options.max_side_px is not None and max(record["height"], record["width"]) > options.max_side_px
    if too_large or not record["is_plain"]:
        data = reencode(data, max_side_px=options.max_side_px, quality=options.quality)
        sha256 = hashlib.sha256(data).digest()
    label = classes.index(picture.class_name)
    return Sample(data, sha256, label, picture.class_name, path)


def _description(job: Job) -> dict[str, Any]:
    """What the manifest says of how the set was made, in JSON's types."""
    described: dict[str, Any] = json.loads(json.dumps(dict(job.recipe) | {"options": asdict(job.options)}))
    return described


def _identity(job: Job, inputs: _Inputs, hashes: Sequence[bytes]) -> str:
    """One hash of all that a set is a function of: each image's content, name, class and split, and the options."""
    digest = hashlib.sha256(json.dumps([_description(job), inputs.layout.classes, dict(job.bins)]).encode())
    for picture, sha256 in zip(inputs.layout.pictures, hashes, strict=True):
        line = [picture.file.path, picture.class_name, picture.split, sha256.hex()]
        digest.update(json.dumps(line).encode() + b"\n")
    for left in inputs.left_out:
        digest.update(json.dumps([left.source, left.reason]).encode() + b"\n")
    return digest.hexdigest()


def find_made(job: Job) -> Manifest | None:
    """The finished set of a recipe that draws its images, which need not be drawn to know that they are the same."""
    if not (job.out / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.load(job.out)
    described = {key: value for key, value in manifest.recipe.items() if key != "inputs_sha256"}
    if described != _description(job) or manifest.bins != dict(job.bins):
        return None
    check_files(manifest)
    return manifest


def _already_made(job: Job, identity: str, num_images: int) -> Manifest:
    manifest = Manifest.load(job.out)
    if manifest.recipe.get("inputs_sha256") != identity:
        raise ShardError(
            f"{job.out} is a finished set of other images or other options than these {num_images:,} images",
            "it would be lost, and runs that were trained on it could no longer be explained",
            "give another --out, or --overwrite to replace it",
        )
    check_files(manifest)
    print(f"{job.out} is already made of these {num_images:,} images with these options: nothing to do")
    return manifest
