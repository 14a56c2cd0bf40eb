"""A job: one shard set to create, with its source, destination and options, and the hash that identifies all of it.

A job's images are listed here with their classes and, if the source or list files define them, their splits. An image
goes into a shard unchanged or encoded as JPEG again.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wasteddp.data.decoding.decode import DEFAULT_QUALITY, UndecodableError, reencode
from wasteddp.data.manifest import LeftOut, Manifest
from wasteddp.errors import SourceError, inert, joined, storage
from wasteddp.sharding import duplicates, groups, scan, splits
from wasteddp.sharding.corrections import Corrections, apply_corrections
from wasteddp.sharding.sources.archives import open_source
from wasteddp.sharding.sources.files import Source
from wasteddp.sharding.sources.layout import (
    ClassFolders,
    Layout,
    SourceImage,
    check_classes,
    offer_groups,
    read_folders,
    read_table,
    rename_classes,
    require_files,
    warn_of_similar,
)
from wasteddp.sharding.writer import Sample


@dataclass(frozen=True, slots=True)
class Options:
    """What the content of a set depends on, besides the images. `fractions` None: the default, if any are needed.

    `split_rule` and `group_near_duplicates` None: stratified and grouped, if the images are not split yet (`settled`).
    """

    fractions: tuple[float, float, float] | None = None
    split_seed: int = 0
    max_side_px: int | None = None
    quality: int = DEFAULT_QUALITY
    shard_mb: float = 256.0
    keep_conflicts: bool = False
    group_near_duplicates: bool | None = None
    near_duplicate_distance: int = duplicates.DEFAULT_DISTANCE
    max_left_out: float | None = None
    split_rule: str | None = None  # of `splits.RULES`; "" where images are already split
    least_per_class: int = 0  # in each split
    group_column: str = ""  # at most one of these three names the group of an image, which stays in one split
    group_level: int = 0  # of the folder, 1 the outermost, -1 the innermost
    group_pattern: str = ""  # searched in the path
    leave_out: tuple[str, ...] = ()  # the groups that are the test split
    folds: int = 0  # instead of train and val

    @property
    def group_rule(self) -> str:
        return groups.describe_rule(self.group_column, self.group_level, self.group_pattern)

    @property
    def max_shard_bytes(self) -> int:
        return int(self.shard_mb * 1e6)

    def check(self, *, may_lack_train: bool = False) -> None:
        """Check that each value is in its range.

        Raises:
            SourceError: a value is out of range.
        """
        if self.fractions is not None:
            splits.check_fractions(self.fractions, may_lack_train=may_lack_train)
        groups.check_rule(self.group_column, self.group_level, self.group_pattern, leave_out=self.leave_out)
        ranges = (
            ("--max-side", self.max_side_px or 16, 16, 65_500),
            ("--quality", self.quality, 1, 100),
            ("--shard-mb", self.shard_mb, 0.001, 1_000_000),
            ("--near-duplicate-distance", self.near_duplicate_distance, 0, duplicates.MAX_DISTANCE),
            ("--max-left-out", self.max_left_out or 0, 0, float("inf")),
            ("--least-per-class", self.least_per_class, 0, float("inf")),
            ("--folds", self.folds or 2, 2, 1000),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise SourceError(f"{name} is {value:g}", "it is out of range", f"give {low:g} to {high:g}")

    def settled(self, *, is_split: bool) -> Options:
        """Return the options without None where a set by fractions has a default."""
        if is_split:
            asked = self.group_near_duplicates
            return replace(self, split_rule="", group_near_duplicates=self.folds > 0 if asked is None else asked)
        rule = self.split_rule or splits.RULES[0]
        group = self.group_near_duplicates
        fractions = self.fractions or (splits.DEFAULT_FRACTIONS if rule == "stratified" else None)
        return replace(
            self,
            split_rule=rule,
            group_near_duplicates=rule == "stratified" if group is None else group,
            fractions=fractions,
        )

    def described(self) -> dict[str, Any]:
        """Return the options as the manifest records them. The newer ones are left out where they do not matter."""
        described = asdict(self)
        if self.split_rule != "stratified":
            del described["split_rule"]
        for name in ("least_per_class", "group_column", "group_level", "group_pattern", "leave_out", "folds"):
            if not described[name]:
                del described[name]
        return described


@dataclass(frozen=True, slots=True)
class Job:
    """One shard set to create."""

    source: Path
    out: Path
    options: Options = field(default_factory=Options)
    classes: tuple[str, ...] = ()  # in order; empty: the sorted names
    may_lack_classes: bool = False  # some of `classes` may have no image
    bins: Mapping[str, str] = field(default_factory=dict)
    split_files: Mapping[str, Path] = field(default_factory=dict)
    extends: Manifest | None = None  # a set whose images keep their splits
    recipe: Mapping[str, Any] = field(default_factory=dict)  # stored in the manifest
    class_names: Mapping[str, str] = field(default_factory=dict)  # name in the source -> name in the set
    class_folders: ClassFolders = ""
    ignore: tuple[str, ...] = ()  # patterns of names
    encoding: str = ""  # of the names in an archive; empty: UTF-8
    corrections: Corrections | None = None  # of labels

    def described(self) -> dict[str, Any]:
        """Return how the set is created, as the manifest records it, in JSON types."""
        renamed = {"class_names": dict(self.class_names)} if self.class_names else {}
        described = dict(self.recipe) | renamed | {"options": self.options.described()}
        if self.corrections:
            described["corrections"] = self.corrections.described()
        if self.extends:
            described["extends"] = {"name": self.extends.name, "sha256": self.extends.sha256}
        in_json: dict[str, Any] = json.loads(json.dumps(described))
        return in_json


@dataclass(frozen=True, slots=True)
class Listing:
    """The images of a job, before any of them is read."""

    source: Source
    layout: Layout
    left_out: tuple[LeftOut, ...] = ()  # in no list, or in a list but missing


def identity(job: Job, listing: Listing, hashes: Sequence[bytes]) -> str:
    """Return one hash of everything a set depends on: each image's content, name, class and split, and the options."""
    digest = hashlib.sha256(json.dumps([job.described(), listing.layout.classes, dict(job.bins)]).encode())
    for image, sha256 in zip(listing.layout.images, hashes, strict=True):
        line = [image.file.path, image.class_name, image.split, sha256.hex(), *[image.group][: bool(image.group)]]
        digest.update(json.dumps(line).encode() + b"\n")
    for left in listing.left_out:
        digest.update(json.dumps([left.source, left.reason]).encode() + b"\n")
    return digest.hexdigest()


def groups_of_old(options: Options, old: Manifest) -> Options:
    """Return the options with the groups and folds of the set that is extended."""
    recorded = old.recipe.get("options", {})
    return replace(
        options,
        group_column=recorded.get("group_column", ""),
        group_level=recorded.get("group_level", 0),
        group_pattern=recorded.get("group_pattern", ""),
        leave_out=tuple(recorded.get("leave_out", ())),
        folds=recorded.get("folds", 0),
    )


def list_images(job: Job, work: Path) -> Listing:
    """Open the source of a job and list its images. A compressed tar is unpacked into `work`.

    Raises:
        SourceError: there are no images, classes or lists contradict each other, too many listed images are missing, or
            the set would be in the folder of its images.
    """
    _refuse_out_in_source(job)
    source: Source
    classes = () if job.class_names else job.classes  # else they are those of the new names
    options = groups_of_old(job.options, job.extends) if job.extends else job.options
    if job.source.suffix.lower() == ".csv" and job.source.is_file():
        source, layout = read_table(
            job.source, classes=classes, may_lack=job.may_lack_classes, group_column=options.group_column
        )
        allowed = scan.max_unusable(len(layout.images), options.max_left_out)
        require_files(job.source, layout.images, allowed=allowed)
    elif options.group_column:
        raise SourceError(
            f"--group-column {options.group_column} is given, and {job.source} is not a CSV",
            "the groups of the images are not known",
            "name them by their folders or paths: --group-level or --group-pattern",
        )
    else:
        source = open_source(job.source, work_folder=work, ignore=job.ignore, encoding=job.encoding)
        command = f"wasteddp shard {shlex.quote(str(job.source))} --out {shlex.quote(str(job.out))}"
        layout = read_folders(
            source,
            job.source,
            classes=classes,
            may_lack=job.may_lack_classes,
            class_folders=job.class_folders,
            command=command,
        )
        if job.class_folders == "inner" and not options.group_rule:
            offer_groups(layout, command)
    layout = groups.assign_groups(layout, options.group_level, options.group_pattern)
    if job.class_names:
        layout = rename_classes(layout, job.class_names, job.source, classes=job.classes, may_lack=job.may_lack_classes)
    warn_of_similar(layout.classes, job.source, old=job.extends.classes if job.extends else ())
    if job.extends:
        _report_changes(layout.classes, job.extends)
    absent = sorted(set(layout.classes) - {image.class_name for image in layout.images})
    if absent:
        named = inert(joined(absent))
        print(f"{job.source} has no image of {len(absent)} of the {len(layout.classes)} classes: {named}")
    by_fractions = (
        job.options.leave_out or job.options.fractions or job.options.split_rule or job.options.least_per_class
    )
    if layout.is_split and (job.split_files or by_fractions):
        raise SourceError(
            f"{job.source} is already split into {', '.join(sorted({p.split for p in layout.images}))}",
            "a second split would mix images that were kept apart",
            "leave out --fractions, --split-rule, --least-per-class, --leave-out and --split-files, or give the class "
            "folders without the split folders",
        )
    if job.split_files and by_fractions:
        raise SourceError(
            "both list files and fractions, or an option of fractions, are given",
            "an image would have two splits",
            "give only one of them",
        )
    if job.bins and set(job.bins) != set(layout.classes):
        raise SourceError(
            f"without a bin: {joined(sorted(set(layout.classes) - set(job.bins))) or '-'}; bins of unknown classes: "
            f"{joined(sorted(set(job.bins) - set(layout.classes))) or '-'}; the classes are {joined(layout.classes)}",
            "a classified image could have no bin",
            "give one bin for each class",
        )
    for line in (*source.notes, *layout.notes()):
        print(inert(line))
    if not job.split_files:
        return _corrected(job, Listing(source, layout))
    layout, not_listed, missing = splits.apply_lists(layout, splits.read_list_files(job.split_files))
    listed = {image.class_name for image in layout.images}
    check_classes(listed, layout.classes, "the lists of the splits", may_lack=job.may_lack_classes)
    gone = [LeftOut(line.name, "unreadable", f"listed in {line.place}, but not there") for line in missing]
    if len(gone) > scan.max_unusable(len(layout.images) + len(gone), job.options.max_left_out):
        raise scan.too_many(gone, len(layout.images) + len(gone), job.options.max_left_out)
    others = (LeftOut(path, "not_listed", "no list names it") for path in not_listed)
    return _corrected(job, Listing(source, layout, (*gone, *others)))


def _refuse_out_in_source(job: Job) -> None:
    """Refuse a set among its images: its files would be read as one of their classes."""
    source, out = job.source.resolve(), job.out.resolve()
    if not source.is_dir() or not out.is_relative_to(source):
        return
    if not any(part.startswith(".") for part in out.relative_to(source).parts):  # hidden folders are not read
        raise SourceError(
            f"--out {job.out} is in the folder of the images, {job.source}",
            "the files of the set would be among the images, and its folder would be taken for a class",
            "name a folder outside it",
        )


def _report_changes(classes: Sequence[str], old: Manifest) -> None:
    """Print which classes are not those of the set that is extended: a model of the one does not fit the other."""
    added, gone = sorted(set(classes) - set(old.classes)), sorted(set(old.classes) - set(classes))
    if added or gone:
        found = [f"new: {joined(added)}"] * bool(added) + [f"without images: {joined(gone)}"] * bool(gone)
        print(inert(f"warning: the classes are not those of {old.where}: {'; '.join(found)}"))


def _corrected(job: Job, listing: Listing) -> Listing:
    """Return the listing with corrected labels, and groups that the splits do not divide."""
    left_out = listing.left_out
    layout = listing.layout
    if job.corrections:
        layout, dropped = apply_corrections(layout, job.corrections, known=[left.source for left in left_out])
        left_out = (*left_out, *dropped)
    if layout.is_split:
        groups.refuse_divided(layout.images)
    return Listing(listing.source, layout, left_out)


def load_sample(
    source: Source, image: SourceImage, record: scan.Scan, classes: Sequence[str], options: Options
) -> Sample:
    """Read an image again, check that it is the scanned one, and encode it again if it cannot be kept unchanged."""
    path = image.file.path
    with storage("reading an image again", path):
        data = source.read(path)
    sha256 = hashlib.sha256(data).digest()
    if sha256 != record["sha256"].tobytes():
        raise SourceError(
            f"{path} changed while it was being sharded",
            "the results of its first reading are no longer valid",
            "run the command again",
        )
    if not stays_unchanged(record, options):
        try:
            data = reencode(data, max_side_px=options.max_side_px, quality=options.quality)
        except (UndecodableError, ValueError) as error:
            raise SourceError(
                f"{path} was read, but cannot be encoded as a JPEG: {error}",
                "the set would not have all the images that were read",
                "remove or repair that image, and run the command again",
            ) from error
        sha256 = hashlib.sha256(data).digest()
    label = classes.index(image.class_name)
    return Sample(data, sha256, label, image.class_name, path, image.group)


def stays_unchanged(record: scan.Scan, options: Options) -> bool:
    """Return whether the image's own bytes go into the shard."""
    too_large = options.max_side_px is not None and max(record["height"], record["width"]) > options.max_side_px
    return bool(record["is_plain"]) and not too_large
