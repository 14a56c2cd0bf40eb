"""Read the names of a source: which files are images, their classes and, if the source is already split, their splits.

glass/a.jpg  metal/b.jpg                    class folders
train/glass/a.jpg  validation/metal/b.jpg   split folders of class folders; also Training, test_set, train/train
site1/glass/a.jpg  site2/glass/b.jpg        refused, unless `class_folders` says which folders are the classes
anything/around/glass/a.jpg                 outer folders that hold everything are skipped
a table with the columns path,label[,split] a CSV
"""

from __future__ import annotations

import csv
import io
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from wasteddp.data.decoding.formats import IMAGE_SUFFIXES
from wasteddp.errors import SourceError, inert, joined, visible
from wasteddp.files import expand_home, read_text
from wasteddp.sharding.sources.files import MISSING, File, Names, PathsSource, Source, advise

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "eval": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_MAX_SHOWN = 5
_LETTERS = re.compile(r"[^\W\d_]+")
_SEPARATOR_LINE = re.compile(r"sep=([,;\t])[,;\t]*\r?\n", re.IGNORECASE)
_SPLIT_WORD = re.compile(rf"({'|'.join(SPLIT_WORDS)})(set|data|images?|imgs?|list|files?)?")

ClassFolders = Literal["", "outer", "inner"]  # "": not known


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image file with the class and split from its path. `split` is empty if the source is not split."""

    file: File
    class_name: str
    split: str = ""
    group: str = ""  # a site, camera, session or object, which stays in one split


@dataclass(frozen=True, slots=True)
class Layout:
    images: tuple[SourceImage, ...]  # sorted by path
    classes: tuple[str, ...]
    ignored: tuple[str, ...] = ()  # files that are not images or are outside the class folders
    spaced: tuple[str, ...] = ()  # class folders with spaces at the ends of their names, which the classes do not have

    @property
    def is_split(self) -> bool:
        return any(image.split for image in self.images)

    def notes(self) -> list[str]:
        """Return lines for the user: what was ignored, and which names were changed."""
        ignored, spaced = (Names(len(names), list(names[:_MAX_SHOWN])) for names in (self.ignored, self.spaced))
        return [
            *ignored.note("ignored {} file(s) that are not images in a class folder"),
            *spaced.note("removed the spaces at the ends of {} class name(s)", show=ascii),
        ]


def read_folders(
    source: Source,
    where: str | Path,
    *,
    classes: Sequence[str] = (),
    may_lack: bool = False,
    class_folders: ClassFolders = "",
    command: str = "wasteddp shard FOLDER --out SET",
) -> Layout:
    """Read classes and splits from folder names. `classes`, if given, fixes the order and must be the same names.

    Args:
        may_lack: some of `classes` may have no image.
        class_folders: which folders are the classes, where outer folders hold the same inner folders.
        command: that shards them, for messages.

    Raises:
        SourceError: there are no images, only one class, an empty class folder, unknown split folders, folders that may
            be sites, or other classes than `classes`.
    """
    files = [file for file in source.files if is_image(file.path)]
    if not files:
        raise SourceError(
            f"{where} holds no images ({len(source.files)} files, {len(source.folders)} folders)",
            "there is nothing to shard",
            "give a folder that holds one folder of images for each class" + advise(source, where),
        )
    paths = [file.path.split("/") for file in files]
    levels = _Levels.find(paths, source, where)
    if class_folders == "inner":
        levels = replace(levels, is_inner=True)
    elif not class_folders:
        _refuse_sites(paths, levels, where, command)
    images = tuple(
        SourceImage(file, parts[at].strip(), levels.split(parts))
        for file, parts in zip(files, paths, strict=True)
        if (at := levels.class_at(parts)) < len(parts) - 1
    )
    found = {image.class_name for image in images}
    named = [parts for parts in (folder.split("/") for folder in source.folders) if len(parts) > levels.skip]
    empty = {parts[-1].strip() for parts in named if len(parts) == levels.class_at(parts) + 1} - found
    empty -= set(classes) if may_lack else set()
    if empty:
        raise SourceError(
            f"{len(empty)} class folder(s) of {where} hold no image: {joined(sorted(empty))}",
            "the model cannot learn a class without images, but would have an output for it",
            "add images, or remove the empty folder(s)" + advise(source, where),
        )
    if not images or (len(found) < 2 and not may_lack):
        loose = len(files) - len(images)
        raise SourceError(
            f"{where} holds {len(found)} class folder(s){': ' * bool(found)}{joined(sorted(found))}"
            + (
                f", and {loose:,} image(s) in no class folder, such as {_first_outside(files, images)}" if loose else ""
            ),
            "the class of an image is the name of its folder, and a classifier needs at least two classes",
            "move the images of each class to a folder of their own, such as glass/ and metal/, or give a CSV with the "
            "columns path,label. For photographs without labels: wasteddp predict" + advise(source, where),
        )
    used = {image.file.path for image in images}
    ignored = tuple(file.path for file in source.files if file.path not in used)
    folders = {parts[at] for parts in paths if (at := levels.class_at(parts)) < len(parts) - 1}
    spaced = tuple(sorted(name for name in folders if name != name.strip()))
    return Layout(images, check_classes(found, classes, where, may_lack=may_lack), ignored, spaced)


def _first_outside(files: Sequence[File], images: Sequence[SourceImage]) -> str:
    used = {image.file.path for image in images}
    return next(file.path for file in files if file.path not in used)


def rename_classes(
    layout: Layout,
    names: Mapping[str, str],
    where: str | Path,
    *,
    classes: Sequence[str] = (),
    may_lack: bool = False,
) -> Layout:
    """Return the layout with other names of classes. Two that get one name become one class.

    Args:
        classes, may_lack: of the new names, as in `read_folders`.

    Raises:
        SourceError: a class that `names` has does not exist, or less than two classes remain.
    """
    if unknown := sorted(names.keys() - set(layout.classes)):
        raise SourceError(
            f"{where} has no class {joined(unknown)}; its classes are {joined(layout.classes)}",
            "the classes would not become those that the file of --classes describes",
            "fix the names in it; they are written as the folders or labels are",
        )
    images = tuple(replace(image, class_name=names.get(image.class_name, image.class_name)) for image in layout.images)
    found = {image.class_name for image in images}
    return replace(layout, images=images, classes=check_classes(found, classes, where, may_lack=may_lack))


def read_csv(path: Path, doing: str, *, unknown: str) -> tuple[list[str], dict[int, dict[str, Any]], str]:
    """Read a CSV that a user wrote. Return its columns in lower case, its rows by their line, and its separator.

    Args:
        doing: for the message if the text cannot be read.
        unknown: consequence for the message if it is not a CSV.

    Raises:
        SourceError: the file is not a CSV, a column is there twice, or a row has more cells than the first line.
    """
    text = read_text(path, doing)
    if hint := _SEPARATOR_LINE.match(text):  # Excel's own line for the separator
        text = text[hint.end() :]
    first = 3 if hint else 2
    separator = hint[1] if hint else max(",;\t", key=text.partition("\n")[0].count)
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        table.fieldnames = columns = [name.strip().lower() for name in table.fieldnames or []]
        rows = dict(enumerate(table, start=first))
    except csv.Error as error:
        raise SourceError(f"{path} is not a CSV file: {error}", unknown, "save it again as CSV") from error
    if twice := next((name for name in columns if name and columns.count(name) > 1), ""):
        raise SourceError(f"{path} has two columns called {twice!r}", unknown, "remove or rename one of them")
    for number, row in rows.items():
        if is_filled(row.get(None)):  # the cells after the last column
            raise SourceError(
                f"{path}, line {number}, has {len(columns) + len(row[None])} cells, and the first line {len(columns)}",
                "it is not known which cell belongs to which column",
                f"put a cell that contains {separator!r} in quotes, or name all columns in the first line",
            )
    return columns, rows, separator


def read_table(
    path: Path, *, classes: Sequence[str] = (), may_lack: bool = False, group_column: str = ""
) -> tuple[PathsSource, Layout]:
    """Read a CSV with the columns path,label[,split]. Paths are relative to the CSV's folder, with / or \\ between
    folders. Columns are separated by commas, semicolons or tabs.

    Args:
        group_column: names the group of each image; empty: there are no groups.

    Raises:
        SourceError: the file is not a CSV with these columns, or a row is incomplete or repeats an image.
    """
    columns, rows, separator = read_csv(path, "reading the table", unknown="its images are not known")
    if not {"path", "label"} <= set(columns) or not rows:
        raise SourceError(
            f"{path} has {len(rows)} rows and the columns {', '.join(columns) or 'none'}",
            "the class of each image is not known",
            f"name the columns in the first line: path{separator}label or path{separator}label{separator}split",
        )
    labels: dict[str, tuple[str, str, str]] = {}
    _require_column(path, columns, group_column)
    if unused := [name for name in columns if name and name not in {"path", "label", "split", group_column.lower()}]:
        print(inert(f"{path}: columns that are not used: {', '.join(unused)}"))
    for number, row in rows.items():
        if not any(map(is_filled, row.values())):
            continue
        name, label = _path_of((row["path"] or "").strip(), path.parent), (row["label"] or "").strip()
        word = (row.get("split") or "").strip().lower()
        is_wrong = not name or not label or "\0" in label or (word and word not in SPLIT_WORDS)
        if is_wrong or name in labels:
            problem = "is listed twice" if name in labels else "has no path, no label or an unknown split"
            raise SourceError(
                f"{path}, line {number}: {name!r},{label!r},{word!r} {problem}",
                "the image would not have exactly one class and one split",
                f"fix the line; splits are {', '.join(SPLIT_WORDS)}",
            )
        group = (row[group_column.lower()] or "").strip() if group_column else ""
        if group_column and not group:
            raise SourceError(
                f"{path}, line {number}: {name!r} has no {group_column}",
                "the image could be in another split than the rest of its group",
                "fill in the column in every row",
            )
        labels[name] = label, SPLIT_WORDS.get(word, ""), group
    without = sum(not split for _, split, _ in labels.values())
    if 0 < without < len(labels):
        raise SourceError(
            f"{path}: {without} of {len(labels)} rows have no split",
            "these images would belong to no split",
            "fill in the column `split` in every row, or in none",
        )
    source = PathsSource(path.parent, list(labels))
    images = tuple(SourceImage(file, *labels[file.path]) for file in source.files)
    found = {image.class_name for image in images}
    return source, Layout(images, check_classes(found, classes, path, may_lack=may_lack))


def require_files(table: Path, images: Sequence[SourceImage], *, allowed: int, may_lack: bool = False) -> None:
    """Check that the files of a table exist, before any is read. Print the first of a few that do not.

    Args:
        allowed: number of files that may be missing.
        may_lack: all files of a class or split may be missing.

    Raises:
        SourceError: more files are missing, or all of a class or split.
    """
    there = [image for image in images if image.file.stamp != MISSING]
    missing = [image.file.path for image in images if image.file.stamp == MISSING]
    lost = [f"the class {visible(name)}" for name in _lost(images, there, lambda image: image.class_name)]
    lost += [f"the split {name}" for name in _lost(images, there, lambda image: image.split)]
    found = f"{len(missing):,} of the {len(images):,} files of {table} do not exist"
    where = f"relative paths are looked for in its folder, {table.parent.resolve()}"
    if len(missing) > allowed or (lost and not may_lack):
        first = "".join(f"\n    {visible(name)}" for name in missing[:_MAX_SHOWN])
        here = f" (the first exists in {Path.cwd()}: move the CSV to that folder)" if Path(missing[0]).exists() else ""
        all_of = f", among them all of {', '.join(lost)}" if lost else f", and {allowed:,} may be missing"
        rest = "or remove the rows of what is lost" if lost else "or leave out these rows, or raise --max-left-out"
        raise SourceError(
            f"{found}{all_of}; {where}:{first}",
            "these images would be missing from the set",
            f"fix the column path, or move the CSV to the folder where its paths begin{here}; {rest}",
        )
    if missing:
        print(inert(f"warning: {found}, such as {visible(missing[0])}; {where}. They are left out"))


def _lost(images: Sequence[SourceImage], there: Sequence[SourceImage], kind: Callable[[SourceImage], str]) -> list[str]:
    """Return the kinds that only images have whose files do not exist."""
    return sorted({kind(image) for image in images} - {kind(image) for image in there})


def is_filled(cells: str | list[str] | None) -> bool:
    """Return whether a cell, or one of the cells after the last column, has text. Excel writes rows without any."""
    return any(cell.strip() for cell in ([cells] if isinstance(cells, str) else cells or []))


def _require_column(path: Path, columns: Sequence[str], name: str) -> None:
    if name and name.lower() not in columns:
        raise SourceError(
            f"{path} has no column {name}; its columns are {', '.join(columns)}",
            "the groups of the images are not known",
            "name one of its columns with --group-column",
        )


def _path_of(text: str, folder: Path) -> str:
    """Return a path of a table as this machine writes it: another system may separate folders by a backslash."""
    path = expand_home(text)
    return path.replace("\\", "/") if "\\" in path and not (folder / path).exists() else path


def check_classes(
    found: set[str], wanted: Sequence[str], where: str | Path, *, may_lack: bool = False
) -> tuple[str, ...]:
    """Return the classes in order: `wanted` if given, otherwise sorted.

    Raises:
        SourceError: there are fewer than two, one is not text or is named twice, or the names differ from `wanted`;
            with `may_lack`, only if a name is not in `wanted`.
    """
    if may_lack and found <= set(wanted):
        return tuple(wanted)
    if len(found) < 2 and not may_lack:
        raise SourceError(
            f"{where} has {len(found)} class(es): {joined(sorted(found)) or 'none'}",
            "a classifier needs at least two classes",
            "give images of at least two classes: in a folder for each, or with two labels in a CSV",
        )
    check_names([*wanted, *(found - set(wanted))], where)
    if wanted and set(wanted) != found:
        missing, unknown = sorted(set(wanted) - found), sorted(found - set(wanted))
        lines = [f"`{rename_line(name, other)}`" for name in unknown if (other := alike(name, missing))]
        renames = f"; --classes FILE with {' and '.join(lines)} renames" if lines else ""
        raise SourceError(
            f"{where} has no images of: {joined(missing) or '-'}; classes not expected: {joined(unknown) or '-'}",
            f"the set would not have the requested classes: {joined(wanted)}",
            f"rename the folders, or name the existing classes{renames}",
        )
    return tuple(wanted) or tuple(sorted(found))


def check_names(names: Sequence[str], where: str | Path) -> None:
    """Check the names of classes.

    Raises:
        SourceError: one is not UTF-8, empty or named twice.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    broken = [name for name in names if not name or not is_text(name)]
    if broken or twice:
        problem = "is named twice" if not broken else "has a name that is not UTF-8" if broken[0] else "has no name"
        raise SourceError(
            f"{where}: the class {(broken or twice)[0]!a} {problem}",
            "reports and model files could not name it, or two outputs would have one name",
            "rename the folder or label, or give --encoding for an archive" if broken else "name each class once",
        )


def warn_of_similar(names: Iterable[str], where: str | Path, *, old: Collection[str] = ()) -> None:
    """Print a warning for names that are equal but for case, spaces and Unicode form.

    Args:
        old: classes of a set that is extended; a name is compared with these too.
    """
    groups: dict[str, set[str]] = {}
    for name in {*names, *old}:
        groups.setdefault(_folded(name), set()).add(name)
    similar = [sorted(group) for group in groups.values() if len(group) > 1]
    lines = list[str]()
    for group in sorted(similar):
        kept = max(group, key=lambda name: (name in old, name))
        lines += [rename_line(name, kept) for name in group if name != kept]
    if lines:
        named = "; ".join(", ".join(map(ascii, group)) for group in sorted(similar))
        of_old = " (also compared with the set that is extended)" if old else ""
        print(
            f"warning: {where} has classes that differ only in case, spaces or Unicode form: {named}{of_old}; "
            "to merge them, write these lines to a file, and give --classes FILE:\n    " + "\n    ".join(lines)
        )


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def rename_line(name: str, new: str) -> str:
    """Return the line of a file for --classes that gives a class another name."""
    return yaml.safe_dump({name: new}, width=10_000).strip()  # in ASCII, with escapes


def alike(name: str, names: Iterable[str]) -> str:
    """Return the first of `names` that differs from a name only in case, spaces or Unicode form; "" if none does."""
    return next((other for other in names if _folded(other) == _folded(name)), "")


def is_text(name: str) -> bool:
    """Return whether a name is UTF-8. Bytes of a file name that are not become lone surrogates."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def split_words(name: str) -> set[str]:
    """Return the splits that words of a name stand for: {"val"} for `imagenet1k-validation-00`."""
    matches = (_SPLIT_WORD.fullmatch(letters.lower()) for letters in _LETTERS.findall(name))
    return {SPLIT_WORDS[match[1]] for match in matches if match}


def is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True, slots=True)
class _Levels:
    """At which place of a path the split and the class are."""

    skip: int  # outer folders that hold everything
    doubled: frozenset[str] | None  # split folders whose only folder is called alike; None: there are no split folders
    is_inner: bool = False  # classes are one level further in

    @classmethod
    def find(cls, paths: list[list[str]], source: Source, where: str | Path) -> _Levels:
        skip = _num_wrappers(paths)
        inside = [parts for parts in paths if len(parts) > skip + 1]
        if not _is_split(inside, skip, source, where):
            return cls(skip, None)
        inner: dict[str, set[str]] = {}
        for parts in inside:
            inner.setdefault(parts[skip], set()).add(parts[skip + 1] if len(parts) > skip + 3 else "")
        doubled = {
            name for name, inside in inner.items() if len(inside) == 1 and split_words(name) == split_words(*inside)
        }
        return cls(skip, frozenset(doubled))

    def class_at(self, parts: list[str]) -> int:
        at = self.skip + self.is_inner
        if self.doubled is not None:
            at += 2 if self.doubled.intersection(parts[self.skip : self.skip + 1]) else 1
        return at

    def split(self, parts: list[str]) -> str:
        return "" if self.doubled is None else min(split_words(parts[self.skip]))


def _num_wrappers(paths: list[list[str]]) -> int:
    """Return how many outer folders hold everything: 2 for `data/trashnet/glass/a.jpg`. A split folder is never one."""
    skip = 0
    while True:
        deep = [parts for parts in paths if len(parts) > skip + 2]
        outer = {parts[skip] for parts in paths if len(parts) > skip + 1}
        if len(outer) != 1 or not deep or any(name.lower() in SPLIT_WORDS for name in outer):
            return skip
        skip += 1


def _is_split(paths: list[list[str]], skip: int, source: Source, where: str | Path) -> bool:
    """Return whether the outermost folders are splits.

    Raises:
        SourceError: only some of them are, so that images would be lost or a split would become a class; or two are one
            split by different words.
    """
    counts = Counter(parts[skip] for parts in paths)
    splits = {name: split_words(name) for name in counts}
    all_named = all(len(named) == 1 for named in splits.values()) and len(set().union(*splits.values())) > 1
    if not all_named and not any(name.lower() in SPLIT_WORDS for name in counts):
        return False
    flat = sum(len(parts) == skip + 2 for parts in paths)
    listed = ", ".join(f"{name} ({count} images)" for name, count in sorted(counts.items()))
    if flat or not all(len(named) == 1 for named in splits.values()):
        raise SourceError(
            f"{where} mixes split folders and other folders: {listed}; {flat} images are in no class folder",
            "a split would be taken for a class, or a class for a split",
            f"name all outer folders as splits ({', '.join(SPLIT_WORDS)}) with class folders in each, or none of them"
            + advise(source, where),
        )
    words: dict[str, set[str]] = {}
    for name, (split,) in splits.items():
        words.setdefault(split, set()).add("".join(_LETTERS.findall(name.lower())))
    if split := next((split for split, names in words.items() if len(names) > 1), ""):
        raise SourceError(
            f"{where} has several folders for the split {split}: {listed}",
            "images that were kept apart would be mixed",
            f"keep one folder for {split}, or put them into one",
        )
    return True


def offer_groups(layout: Layout, command: str) -> None:
    """Print that the folders around the class folders can be groups, if there are several.

    Args:
        command: that shards the images.
    """
    paths = [(image.file.path.split("/"), image.class_name) for image in layout.images]
    inside = [(parts, [part.strip() for part in parts[-2::-1]], name) for parts, name in paths]
    levels = {len(parts) - 1 - folders.index(name) - 1 for parts, folders, name in inside if name in folders}
    outer = {parts[level - 1] for level in levels for parts, _ in paths if level > 0}
    if len(levels) == 1 and len(outer) > 1:
        named = inert(", ".join(sorted(outer)[:_MAX_SHOWN]))
        print(
            f"{named} may be sites or cameras. To keep each of them in one split:\n"
            f"    {command} --class-folders inner --group-level {min(levels)}"
        )


def _refuse_sites(paths: list[list[str]], levels: _Levels, where: str | Path, command: str) -> None:
    """Refuse outer folders that all hold the same inner folders: either could be the classes."""
    inner: dict[str, set[str]] = {}
    for parts in paths:
        if (at := levels.class_at(parts)) < len(parts) - 1:
            inner.setdefault(parts[at], set()).add(parts[at + 1] if at < len(parts) - 2 else "")
    common = sorted(set.intersection(*inner.values()) - {""}) if len(inner) > 1 else []
    if len(common) > 1 and not any("" in names for names in inner.values()):
        outer = ", ".join(sorted(inner)[:_MAX_SHOWN])
        outer_level = 1 + min(levels.class_at(parts) for parts in paths)
        raise SourceError(
            f"each of the {len(inner)} folders {outer} in {where} holds the folders {', '.join(common[:_MAX_SHOWN])}",
            "sites, cameras or splits would be taken for classes",
            f"if {common[0]} is a class and {min(inner)} is a site, keep each site in one split:\n"
            f"    {command} --class-folders inner --group-level {outer_level}\n"
            f"  or test on one site: add --leave-out {shlex.quote(min(inner))}. If {min(inner)} is a class: "
            "--class-folders outer. Name folders of splits train, val and test",
        )
