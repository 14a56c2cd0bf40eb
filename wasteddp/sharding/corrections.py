"""Corrections of labels: a CSV `path,class[,action]` that `wasteddp review` or a person writes.

A path is that of the image in the source. A row gives the image another class, or with the action `drop` leaves it out.
A row with the class that the image has already confirms it; the actions `correct` and `confirm` may say which it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wasteddp.data.manifest import LeftOut
from wasteddp.errors import SourceError, joined
from wasteddp.files import sha256_of
from wasteddp.sharding.sources.layout import Layout, is_filled, read_csv

_MAX_NAMED = 5
_DROP = "drop"
_LABEL = ("", "confirm", "correct")  # actions of a row with a class


@dataclass(frozen=True, slots=True)
class Corrections:
    path: Path
    sha256: str  # of the file
    class_of: Mapping[str, str]  # path of an image -> its class; empty: it is left out

    def described(self) -> dict[str, Any]:
        """Return what the manifest records of it."""
        dropped = sum(not name for name in self.class_of.values())
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "labels": len(self.class_of) - dropped,
            "dropped": dropped,
        }


def read_corrections(path: Path) -> Corrections:
    """Read a file of corrections.

    Raises:
        SourceError: it has other columns, or a row has no path, neither a class nor the action `drop`, or repeats one.
    """
    columns, rows, _ = read_csv(path, "reading the corrections", unknown="its corrections are not known")
    if "path" not in columns or not {"class", "action"} & set(columns):
        raise SourceError(
            f"{path} has the columns {', '.join(columns) or 'none'}",
            "its corrections are not known",
            "add a first line `path,class` or `path,class,action`; actions are confirm, correct and drop",
        )
    class_of: dict[str, str] = {}
    for number, row in rows.items():
        if not any(map(is_filled, row.values())):
            continue
        name, class_name, action = ((row.get(key) or "").strip() for key in ("path", "class", "action"))
        name = name.replace("\\", "/") if "\\ud" not in name else name
        is_drop = action.lower() == _DROP
        is_label = action.lower() in _LABEL and class_name != ""
        if not name or not (is_drop or is_label) or name in class_of:
            raise SourceError(
                f"{path}, line {number}: {name!r},{class_name!r},{action!r} "
                + ("is there twice" if name in class_of else "has no path, or neither a class nor the action drop"),
                "the image would not have exactly one label",
                "fix the line",
            )
        class_of[name] = "" if is_drop else class_name
    return Corrections(path, sha256_of(path), class_of)


def apply_corrections(
    layout: Layout, corrections: Corrections, *, known: Collection[str]
) -> tuple[Layout, list[LeftOut]]:
    """Return the layout with the corrected classes, and the images that are dropped.

    Args:
        known: paths that are left out already.

    Raises:
        SourceError: the source has no such image or class.
    """
    where, paths = corrections.path, {_written(image.file.path): image.file.path for image in layout.images}
    others = {_written(path) for path in known}
    class_of = dict[str, str]()
    unknown, classes = list[str](), set[str]()
    for name, class_name in corrections.class_of.items():
        path = paths.get(name) or paths.get(name.removeprefix("./"))
        if class_name not in layout.classes:  # see CsvWriter
            class_name = class_name.removeprefix("'")
        if path is not None:
            class_of[path] = class_name
        elif name not in others:
            unknown.append(name)
        classes |= {class_name} - {"", *layout.classes}
    if unknown or classes:
        more = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
        problems = [f"no image {', '.join(unknown[:_MAX_NAMED])}{more}"] * bool(unknown)
        problems += [f"no class {joined(sorted(classes))}"] * bool(classes)
        raise SourceError(
            f"{where}: the source has {'; '.join(problems)}; its classes are {joined(layout.classes)}",
            "these labels would stay uncorrected",
            "give the corrections with the source that they were made for, or fix the rows",
        )
    dropped = [LeftOut(path, "dropped", f"dropped by {where.name}") for path, name in class_of.items() if not name]
    gone = {left.source for left in dropped}
    images = tuple(
        replace(image, class_name=class_of.get(image.file.path, image.class_name))
        for image in layout.images
        if image.file.path not in gone
    )
    before = {image.file.path: image.class_name for image in layout.images}
    changed = sum(bool(name) and name != before[path] for path, name in class_of.items())
    confirmed = len(class_of) - changed - len(dropped)
    print(f"{where}: {changed:,} label(s) corrected, {confirmed:,} confirmed, {len(dropped):,} image(s) dropped")
    return replace(layout, images=images), dropped


def _written(path: str) -> str:
    """Return a path as a CSV has it: a byte that is not UTF-8 as \\udcXX."""
    return path.encode("utf-8", "backslashreplace").decode()
