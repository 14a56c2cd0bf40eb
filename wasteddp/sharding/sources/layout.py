"""What the names of a source mean: which files are images, of which class and, if it was split before, which split.

glass/a.jpg  metal/b.jpg                    class folders
train/glass/a.jpg  validation/metal/b.jpg   split folders of class folders
anything/around/glass/a.jpg                 folders that wrap all the others are skipped
a table with the columns path,label[,split] a CSV
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from wasteddp.errors import SourceError, storage
from wasteddp.sharding.sources.archives import File, PathsSource, Source

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

# HEIC, HEIF and AVIF are images that may have no decoder here: they are then listed as unreadable, never passed over.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .webp .gif .bmp .tif .tiff .heic .heif .avif".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file and what its place says of it; `split` is empty where the source is not split."""

    file: File
    class_name: str
    split: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    pictures: tuple[Picture, ...]  # sorted by path
    classes: tuple[str, ...]
    ignored: tuple[str, ...] = ()  # files that are no images, or stand outside any class folder

    @property
    def is_split(self) -> bool:
        return any(picture.split for picture in self.pictures)


def read_folders(source: Source, where: str | Path, *, classes: Sequence[str] = ()) -> Layout:
    """Classes and splits from the names of folders; `classes`, where given, fixes the order and must be the same names.

    Raises:
        SourceError: no images, one class, an empty class folder, unknown split folders, other classes than `classes`.
    """
    images = [file for file in source.files if is_image(file.path)]
    if not images:
        raise SourceError(
            f"{where} holds no images ({len(source.files)} files, {len(source.folders)} folders)",
            "there is nothing to shard",
            "give a folder that holds one folder of images for each class",
        )
    skip = _num_wrappers([file.path.split("/") for file in images])
    inside = [file for file in images if file.path.count("/") > skip]
    is_split = _is_split(inside, skip, where)
    pictures = tuple(_picture(file, skip, is_split) for file in inside)
    found = {picture.class_name for picture in pictures}
    depth = skip + (2 if is_split else 1)
    empty = {f.split("/")[depth - 1] for f in source.folders if f.count("/") == depth - 1} - found
    if empty:
        raise SourceError(
            f"{len(empty)} class folder(s) of {where} hold no image: {', '.join(sorted(empty))}",
            "a class without images cannot be learned, and would take a place in the network's answer",
            "put images there, or remove the empty folder(s)",
        )
    used = {picture.file.path for picture in pictures}
    ignored = tuple(file.path for file in source.files if file.path not in used)
    return Layout(pictures, check_classes(found, classes, where), ignored)


def read_table(path: Path, *, classes: Sequence[str] = ()) -> tuple[PathsSource, Layout]:
    """Source and layout from a CSV with the columns path,label[,split]; paths are relative to the CSV's folder."""
    with storage("reading the table", path), path.open(newline="", encoding="utf-8-sig") as file:
        try:
            table = csv.DictReader(file, strict=True)
            columns = table.fieldnames or []
            rows = list(table)
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(
                f"{path} is no CSV in UTF-8: {error}", "its images are unknown", "save it again"
            ) from error
    if not {"path", "label"} <= set(columns) or not rows:
        raise SourceError(
            f"{path} has {len(rows)} rows and the columns {', '.join(columns) or 'none'}",
            "which image is of which class cannot be told",
            "give it a first line `path,label` or `path,label,split` and a line for each image",
        )
    labels: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(rows, start=2):
        name, label = (row["path"] or "").strip(), (row["label"] or "").strip()
        word = (row.get("split") or "").strip().lower()
        if not name or not label or name in labels or (word and word not in SPLIT_WORDS):
            problem = "stands there twice" if name in labels else "lacks a path or a label, or has an unknown split"
            raise SourceError(
                f"{path}, line {number}: {name!r},{label!r},{word!r} {problem}",
                "the image could not be given one class and one split",
                f"fix the line; splits are {', '.join(SPLIT_WORDS)}",
            )
        labels[name] = label, SPLIT_WORDS.get(word, "")
    without = sum(not split for _, split in labels.values())
    if 0 < without < len(labels):
        raise SourceError(
            f"{path}: {without} of {len(labels)} rows have no split",
            "images of a split set would be put anywhere",
            "fill in the column `split` in every row, or in none",
        )
    source = PathsSource(path.parent, list(labels))
    pictures = tuple(Picture(file, *labels[file.path]) for file in source.files)
    return source, Layout(pictures, check_classes({p.class_name for p in pictures}, classes, path))


def check_classes(found: set[str], wanted: Sequence[str], where: str | Path) -> tuple[str, ...]:
    """The classes in their order: `wanted` where given, else sorted.

    Raises:
        SourceError: fewer than two, or not the same names.
    """
    if len(found) < 2:
        raise SourceError(
            f"{where} has {len(found)} class(es): {', '.join(sorted(found)) or 'none'}",
            "there is nothing to tell apart",
            "give a folder that holds one folder of images for each class, at least two",
        )
    if wanted and set(wanted) != found:
        missing, unknown = sorted(set(wanted) - found), sorted(found - set(wanted))
        raise SourceError(
            f"{where} has no images of: {', '.join(missing) or '-'}; classes not expected: {', '.join(unknown) or '-'}",
            f"the classes would not be those that were asked for: {', '.join(wanted)}",
            "rename the folders, or name the classes that are there",
        )
    return tuple(wanted) or tuple(sorted(found))


def is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def _num_wrappers(paths: list[list[str]]) -> int:
    """How many outer folders wrap everything: `data/trashnet/glass/a.jpg` has 2. A lone split folder is no wrapper."""
    skip = 0
    while True:
        deep = [parts for parts in paths if len(parts) > skip + 2]
        outer = {parts[skip] for parts in paths if len(parts) > skip + 1}
        if len(outer) != 1 or not deep or outer & SPLIT_WORDS.keys():
            return skip
        skip += 1


def _is_split(files: list[File], skip: int, where: str | Path) -> bool:
    """Whether the outermost folders are splits.

    Raises:
        SourceError: some are and some are not, so that images would be lost or a split become a class.
    """
    counts = Counter(file.path.split("/")[skip] for file in files)
    words = {word for word in counts if word.lower() in SPLIT_WORDS}
    if not words:
        return False
    others = sorted(counts.keys() - words)
    flat = sum(file.path.count("/") == skip + 1 for file in files)
    if others or flat:
        listed = ", ".join(f"{name} ({count} images)" for name, count in sorted(counts.items()))
        raise SourceError(
            f"{where} mixes split folders and others: {listed}; {flat} images are in no class folder",
            "a split would be taken for a class, or a class for a split",
            f"name all outer folders as splits ({', '.join(SPLIT_WORDS)}) with class folders in each, or none of them",
        )
    return True


def _picture(file: File, skip: int, is_split: bool) -> Picture:
    parts = file.path.split("/")[skip:]
    return Picture(file, parts[1], SPLIT_WORDS[parts[0].lower()]) if is_split else Picture(file, parts[0])
