"""Read the names of a source: which files are images, their classes and, if the source is already split, their splits.

glass/a.jpg  metal/b.jpg                    class folders
train/glass/a.jpg  validation/metal/b.jpg   split folders of class folders
anything/around/glass/a.jpg                 outer folders that hold everything are skipped
a table with the columns path,label[,split] a CSV
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from wasteddp.errors import SourceError
from wasteddp.files import expand_home, read_text
from wasteddp.sharding.sources.archives import File, PathsSource, Source

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

# HEIC, HEIF and AVIF may have no decoder here. They are then left out as unreadable, not ignored.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .webp .gif .bmp .tif .tiff .heic .heif .avif".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image file with the class and split from its path. `split` is empty if the source is not split."""

    file: File
    class_name: str
    split: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    images: tuple[SourceImage, ...]  # sorted by path
    classes: tuple[str, ...]
    ignored: tuple[str, ...] = ()  # files that are not images or are outside the class folders

    @property
    def is_split(self) -> bool:
        return any(image.split for image in self.images)


def read_folders(source: Source, where: str | Path, *, classes: Sequence[str] = ()) -> Layout:
    """Read classes and splits from folder names. `classes`, if given, fixes the order and must be the same names.

    Raises:
        SourceError: there are no images, only one class, an empty class folder, unknown split folders, or other classes
            than `classes`.
    """
    files = [file for file in source.files if is_image(file.path)]
    if not files:
        raise SourceError(
            f"{where} holds no images ({len(source.files)} files, {len(source.folders)} folders)",
            "there is nothing to shard",
            "give a folder that holds one folder of images for each class",
        )
    skip = _num_wrappers([file.path.split("/") for file in files])
    inside = [file for file in files if file.path.count("/") > skip]
    is_split = _is_split(inside, skip, where)
    images = tuple(_source_image(file, skip, is_split) for file in inside)
    found = {image.class_name for image in images}
    depth = skip + (2 if is_split else 1)
    empty = {f.split("/")[depth - 1] for f in source.folders if f.count("/") == depth - 1} - found
    if empty:
        raise SourceError(
            f"{len(empty)} class folder(s) of {where} hold no image: {', '.join(sorted(empty))}",
            "the model cannot learn a class without images, but would have an output for it",
            "add images, or remove the empty folder(s)",
        )
    used = {image.file.path for image in images}
    ignored = tuple(file.path for file in source.files if file.path not in used)
    return Layout(images, check_classes(found, classes, where), ignored)


def read_table(path: Path, *, classes: Sequence[str] = ()) -> tuple[PathsSource, Layout]:
    """Read a CSV with the columns path,label[,split]. Paths are relative to the CSV's folder, with / or \\ between
    folders. Columns are separated by commas, semicolons or tabs.

    Raises:
        SourceError: the file is not a CSV with these columns, or a row is incomplete or repeats an image.
    """
    text = read_text(path, "reading the table")
    separator = max(",;\t", key=text.partition("\n")[0].count)
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        table.fieldnames = columns = [name.strip().lower() for name in table.fieldnames or []]
        rows = list(table)
    except csv.Error as error:
        raise SourceError(f"{path} is not a CSV file: {error}", "its images are not known", "fix it") from error
    if not {"path", "label"} <= set(columns) or not rows:
        raise SourceError(
            f"{path} has {len(rows)} rows and the columns {', '.join(columns) or 'none'}",
            "the class of each image is not known",
            "add a first line `path,label` or `path,label,split`, and a line for each image",
        )
    labels: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(rows, start=2):
        name, label = _path_of((row["path"] or "").strip(), path.parent), (row["label"] or "").strip()
        word = (row.get("split") or "").strip().lower()
        if not name or not label or name in labels or (word and word not in SPLIT_WORDS):
            problem = "is listed twice" if name in labels else "has no path, no label or an unknown split"
            raise SourceError(
                f"{path}, line {number}: {name!r},{label!r},{word!r} {problem}",
                "the image would not have exactly one class and one split",
                f"fix the line; splits are {', '.join(SPLIT_WORDS)}",
            )
        labels[name] = label, SPLIT_WORDS.get(word, "")
    without = sum(not split for _, split in labels.values())
    if 0 < without < len(labels):
        raise SourceError(
            f"{path}: {without} of {len(labels)} rows have no split",
            "these images would belong to no split",
            "fill in the column `split` in every row, or in none",
        )
    source = PathsSource(path.parent, list(labels))
    images = tuple(SourceImage(file, *labels[file.path]) for file in source.files)
    return source, Layout(images, check_classes({p.class_name for p in images}, classes, path))


def _path_of(text: str, folder: Path) -> str:
    """Return a path of a table as this machine writes it: another system may separate folders by a backslash."""
    path = expand_home(text)
    return path.replace("\\", "/") if "\\" in path and not (folder / path).exists() else path


def check_classes(found: set[str], wanted: Sequence[str], where: str | Path) -> tuple[str, ...]:
    """Return the classes in order: `wanted` if given, otherwise sorted.

    Raises:
        SourceError: there are fewer than two, or the names differ from `wanted`.
    """
    if len(found) < 2:
        raise SourceError(
            f"{where} has {len(found)} class(es): {', '.join(sorted(found)) or 'none'}",
            "a classifier needs at least two classes",
            "give a folder that holds one folder of images for each class, at least two",
        )
    if wanted and set(wanted) != found:
        missing, unknown = sorted(set(wanted) - found), sorted(found - set(wanted))
        raise SourceError(
            f"{where} has no images of: {', '.join(missing) or '-'}; classes not expected: {', '.join(unknown) or '-'}",
            f"the set would not have the requested classes: {', '.join(wanted)}",
            "rename the folders, or name the existing classes",
        )
    return tuple(wanted) or tuple(sorted(found))


def is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def _num_wrappers(paths: list[list[str]]) -> int:
    """Return how many outer folders hold everything: 2 for `data/trashnet/glass/a.jpg`. A split folder is never one."""
    skip = 0
    while True:
        deep = [parts for parts in paths if len(parts) > skip + 2]
        outer = {parts[skip] for parts in paths if len(parts) > skip + 1}
        if len(outer) != 1 or not deep or outer & SPLIT_WORDS.keys():
            return skip
        skip += 1


def _is_split(files: list[File], skip: int, where: str | Path) -> bool:
    """Return whether the outermost folders are splits.

    Raises:
        SourceError: only some of them are, so that images would be lost or a split would become a class.
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
            f"{where} mixes split folders and other folders: {listed}; {flat} images are in no class folder",
            "a split would be taken for a class, or a class for a split",
            f"name all outer folders as splits ({', '.join(SPLIT_WORDS)}) with class folders in each, or none of them",
        )
    return True


def _source_image(file: File, skip: int, is_split: bool) -> SourceImage:
    parts = file.path.split("/")[skip:]
    return SourceImage(file, parts[1], SPLIT_WORDS[parts[0].lower()]) if is_split else SourceImage(file, parts[0])
