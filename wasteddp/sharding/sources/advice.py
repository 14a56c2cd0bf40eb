"""Advise on a source that is not a folder of class folders: what it may be instead, from its names."""

from __future__ import annotations

import shlex
from pathlib import Path, PurePosixPath

from wasteddp.errors import visible
from wasteddp.sharding.sources.files import Source

ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_BOXES = frozenset({"labels", "annotations"})  # folders of YOLO, COCO and Pascal VOC
_MAX_SHOWN = 3


def advise(source: Source, where: str | Path) -> str:
    """Return what to do with a source in which class folders were looked for in vain, as the end of a message.

    Empty if the names do not say what the source may be.
    """
    names = [file.path for file in source.files]
    folders = {part.lower() for name in names for part in name.split("/")[:-1]}
    suffixes = {name: PurePosixPath(name).suffix.lower() for name in names}
    tables = [name for name, suffix in suffixes.items() if suffix == ".csv"]
    archives = [name for name, suffix in suffixes.items() if suffix in ARCHIVES]
    if archives and any(PurePosixPath(name).name == "manifest.json" for name in names):
        return ". If it is a shard set already, train on it: data.shards"
    if _BOXES & folders:
        return (
            ". If it is a set for detection (YOLO, COCO), its labels are boxes, not classes of images: cut the boxes "
            "out into a folder for each class, or give a CSV path,label with one class for each image"
        )
    if tables:
        is_folder = Path(where).is_dir()
        path, unpack = (
            (f"{where}/{tables[0]}", "") if is_folder else (f"FOLDER/{tables[0]}", "unpack the archive, and ")
        )
        return (
            f". If {_shown(tables)} names the classes: with the columns path,label[,split], and paths relative to its "
            f"folder, it is a source: {unpack}wasteddp shard {shlex.quote(path)} --out SET"
        )
    if archives:
        index = "; if these are tars of webdataset: wasteddp index FOLDER" if ".tar" in suffixes.values() else ""
        return f". Unpack {_shown(archives)} first{index}"
    return ""


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(map(visible, names[:_MAX_SHOWN])) + more
