"""A model of a disk that loses what was not synced: from recorded operations to the states that a power cut may leave.

It follows POSIX, which promises less than most file systems: fsync of a file keeps its bytes but not its name, and
fsync of a folder keeps the names in it. Names in one folder are lost from the newest on, each folder by itself, and a
rename within a folder happens or does not. Unsynced bytes of a file are lost in any of the ways of `WAYS`.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from .disk import Operation

# what a cut leaves of that which was not synced
WAYS = {
    "nothing": "neither bytes nor names",
    "names": "all names, and files without their bytes",
    "zeros": "all names, and zeros in the place of the bytes",
    "bytes": "all bytes, and no names",
    "first": "the first names of each folder, and the first bytes of each file, up to a random one",
    "some": "the first names of each folder, and some of the writes, with zeros in the place of the others",
    "all": "everything, as after a kill",
}


class IncompleteError(Exception):
    """The recorded operations do not explain the files: something was done in a way that is not recorded."""


@dataclass(slots=True, eq=False)
class File:
    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # offset and bytes, or a size and None

    def left(self, way: str, draws: random.Random) -> bytes:
        if way in ("nothing", "names"):
            return self.durable
        if way in ("bytes", "all"):
            return bytes(self.content)
        if way == "zeros":
            kept = self.durable[: len(self.content)]
            return kept + bytes(len(self.content) - len(kept))
        left = bytearray(self.durable)
        until = draws.randint(0, len(self.pending))
        for number, (offset, data) in enumerate(self.pending):
            if way == "first" and number > until:
                break
            if way == "first" and number == until and data:
                data = data[: draws.randrange(len(data))]
            if way == "some" and data and draws.random() < 0.5:
                data = bytes(len(data))
            _apply(left, offset, data)
        return bytes(left)


Names: TypeAlias = "dict[str, File | Folder]"


@dataclass(slots=True, eq=False)
class Folder:
    names: Names = field(default_factory=dict)
    durable: Names = field(default_factory=dict)
    pending: list[dict[str, File | Folder | None]] = field(default_factory=list)  # None: the name is removed

    def change(self, change: dict[str, File | Folder | None]) -> None:
        _rename(self.names, change)
        self.pending.append(change)

    def left(self, way: str, draws: random.Random) -> Names:
        if way in ("nothing", "bytes"):
            return self.durable
        if way in ("names", "zeros", "all"):
            return self.names
        left = dict(self.durable)
        for change in self.pending[: draws.randint(0, len(self.pending))]:
            _rename(left, change)
        return left


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    end = offset if data is None else offset + len(data)
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if data is None:
        del content[offset:]
    else:
        content[offset:end] = data


def _rename(names: Names, change: dict[str, File | Folder | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """The files in a folder, and what of them is durable. At first that is all that the folder has."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = _read(root)

    def do(self, operation: Operation) -> None:
        """Apply one operation."""
        if operation.kind in ("mark", "fault"):
            return
        path = Path(operation.path)
        if operation.kind == "fsync":
            node = self._node(path)
            if isinstance(node, File):
                node.durable, node.pending = bytes(node.content), []
            else:
                node.durable, node.pending = dict(node.names), []
        elif operation.kind in ("write", "truncate"):
            file = self._node(path)
            assert isinstance(file, File)
            change = operation.offset, operation.data if operation.kind == "write" else None
            _apply(file.content, *change)
            file.pending.append(change)
        elif operation.kind == "rename":
            node, target = self._node(path), Path(operation.second)
            if path.parent == target.parent:
                self._folder(path.parent).change({path.name: None, target.name: node})
            else:
                self._folder(target.parent).change({target.name: node})
                self._folder(path.parent).change({path.name: None})
        else:
            new = {"create": File, "mkdir": Folder}.get(operation.kind)
            self._folder(path.parent).change({path.name: new() if new else None})

    def write(self, to: Path, way: str, draws: random.Random) -> None:
        """Write the state that a power cut leaves now into `to`, in place of what is there."""
        shutil.rmtree(to, ignore_errors=True)
        _write(self._top, to, way, draws)

    def check(self) -> None:
        """Raise an IncompleteError unless the real folder has the content that the operations have led to."""
        if _contents(_read(self._root)) != _contents(self._top):
            ours, real = dict(_contents(self._top)), dict(_contents(_read(self._root)))
            names = [name for name in sorted(ours.keys() | real.keys()) if ours.get(name) != real.get(name)]
            raise IncompleteError(f"{self._root}: the recorded operations do not explain {', '.join(names)}")

    def _node(self, path: Path) -> File | Folder:
        node: File | Folder = self._top
        for name in path.relative_to(self._root).parts:
            assert isinstance(node, Folder), path
            node = node.names[name]
        return node

    def _folder(self, path: Path) -> Folder:
        node = self._node(path)
        assert isinstance(node, Folder), path
        return node


def _read(path: Path) -> Folder:
    names: Names = {}
    for entry in path.iterdir():
        if entry.is_dir():
            names[entry.name] = _read(entry)
        else:
            content = entry.read_bytes()
            names[entry.name] = File(bytearray(content), content)
    return Folder(names, dict(names))


def _write(folder: Folder, to: Path, way: str, draws: random.Random) -> None:
    to.mkdir()
    for name, node in sorted(folder.left(way, draws).items()):
        if isinstance(node, Folder):
            _write(node, to / name, way, draws)
        else:
            (to / name).write_bytes(node.left(way, draws))


def _contents(folder: Folder, prefix: str = "") -> Iterable[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for name, node in sorted(folder.names.items()):
        if isinstance(node, Folder):
            found += [(f"{prefix}{name}/", b""), *_contents(node, f"{prefix}{name}/")]
        else:
            found.append((prefix + name, bytes(node.content)))
    return found
