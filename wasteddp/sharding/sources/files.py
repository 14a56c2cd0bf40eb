"""Files of a source on a disk: a folder or a list of paths. Also what all sources have in common.

The same rules hold for each source and for `wasteddp predict`: which names are ignored, which links are followed, and
that only regular files are read. `advise` names what a source may be that is not a folder of class folders.
"""

from __future__ import annotations

import fnmatch
import heapq
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

from wasteddp.errors import storage, visible
from wasteddp.files import read_regular

# Hidden files, and the folders of macOS, Synology, QNAP and Windows that hold thumbnails and deleted files.
IGNORED = (".*", "__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information")
MISSING = "missing"  # stamp of a file that does not exist
Listed = list[os.DirEntry[str]]
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_MAX_SHOWN = 5
_BOXES = frozenset({"labels", "annotations"})  # folders of YOLO, COCO and Pascal VOC
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class File:
    """One file of a source. `stamp` changes with the content: size and time, or the checksum of an archive."""

    path: str  # relative to the source, components separated by "/"
    size_bytes: int
    stamp: str


class Source(Protocol):
    @property
    def files(self) -> Sequence[File]:
        """All files, sorted by path, without ignored ones. A file without content is listed; reading it says why."""

    @property
    def folders(self) -> Sequence[str]:
        """All folders that the source names, so that empty ones are detected."""

    @property
    def notes(self) -> Sequence[str]:
        """Lines for the user: what was ignored, and which links were followed."""

    def read(self, path: str) -> bytes:
        """Return the bytes of one file. Safe to call from several threads.

        Raises:
            OSError: the file cannot be read.
        """


class FolderSource:
    """A folder and all its subfolders; see `walk`."""

    def __init__(self, root: Path, *, ignore: Sequence[str] = ()) -> None:
        self._root = root
        files: list[File] = []
        folders: list[str] = []
        walked = Walked()
        with storage("listing the images", root):
            for folder, listed in walk(str(root), ignore, walked):
                if isinstance(listed, OSError):
                    raise listed
                inside = Path(folder).relative_to(root).as_posix()
                folders.append(inside)
                prefix = "" if inside == "." else f"{inside}/"
                files += [_stat(Path(entry.path), prefix + entry.name) for entry in listed]
        self.files = sorted(files, key=lambda file: file.path)
        self.folders = sorted(folders[1:])
        self.notes = walked.notes()

    def read(self, path: str) -> bytes:
        return read_regular(self._root / path)


class PathsSource:
    """The files that a table names, relative to `root`. A missing file raises an error when it is read, not here."""

    folders: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self._root = root
        self.files = [_stat(root / path, path) for path in sorted(paths)]

    def read(self, path: str) -> bytes:
        return read_regular(self._root / path)


@dataclass(slots=True)
class Names:
    """Counts names, of which there may be millions, and keeps the first."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if self.count <= _MAX_SHOWN:
            self.first.append(name)

    def note(self, text: str, *, show: Callable[[str], str] = str) -> list[str]:
        """Return a line with the number and the first of the names, or no line if there are none."""
        more = ", ..." if self.count > len(self.first) else ""
        return [f"{text.format(self.count)}: {', '.join(map(show, self.first))}{more}"] if self.count else []


@dataclass(frozen=True, slots=True)
class Walked:
    """What a walk met besides files and folders."""

    ignored: Names = field(default_factory=Names)
    followed: Names = field(default_factory=Names)  # links to folders
    repeated: Names = field(default_factory=Names)  # links to folders that are listed in another place

    def notes(self) -> list[str]:
        return [
            *self.ignored.note("ignored {} hidden or system file(s) or folder(s)"),
            *self.followed.note("followed {} link(s) to folders"),
            *self.repeated.note("did not follow {} link(s) to folders that are read in another place or hold this one"),
        ]


def walk(root: str, ignore: Sequence[str], walked: Walked) -> Iterator[tuple[str, Listed | OSError]]:
    """Yield each folder with its files, sorted, or with the error if it cannot be listed; then its subfolders.

    Links to folders are followed last, in sorted order, so that the result does not depend on the file system. Each
    folder is read once, whatever links lead to it. A link to a folder that holds `root` is not followed.
    """
    seen = {_identity(str(folder)) for folder in Path(root).resolve().parents}
    links: list[str] = []
    waiting = [root]
    while waiting or links:
        is_link = not waiting
        folder = heapq.heappop(links) if is_link else waiting.pop()
        try:
            identity = _identity(folder)
            if identity in seen:
                walked.repeated.add(folder)
                continue
            seen.add(identity)
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            yield folder, error
            continue
        if is_link:
            walked.followed.add(folder)
        files, folders = [], []
        for entry in entries:
            if is_ignored(entry.name, ignore):
                walked.ignored.add(entry.path)
            elif not _is_folder(entry):
                files.append(entry)
            elif entry.is_symlink():
                heapq.heappush(links, entry.path)
            else:
                folders.append(entry.path)
        yield folder, files
        waiting.extend(reversed(folders))


def is_ignored(path: str, more: Sequence[str] = ()) -> bool:
    """Return whether a component of the path matches one of `IGNORED` or `more`, patterns of `fnmatch`."""
    matches = _pattern((*IGNORED, *more)).match
    return any(part not in ("", ".", "..") and matches(part) is not None for part in path.split("/"))


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


@lru_cache
def _pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, patterns)))


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)  # noqa: PTH116, a path object for each folder is slow
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stat(file: Path, path: str) -> File:
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return File(path, 0, MISSING)
    except (OSError, ValueError):  # a link to itself, a name with a NUL: reading it gives the reason
        return File(path, 0, "unreadable")
    if not stat.S_ISREG(status.st_mode):
        return File(path, 0, "not a file")
    return File(path, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(visible, names[:_NAMES_SHOWN])) + more
