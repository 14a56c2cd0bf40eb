"""One kind of file to damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """A file to damage, and what reads it.

    Args:
        folder: what the reader needs; each input gets a copy of links to it.
        file: the path in `folder` of the file to damage.
        read: called in a process of its own, in the copy of the folder; the exit code of a command, or None.
    """

    name: str
    folder: Path
    file: str
    read: Callable[[Path], int | None]

    @property
    def kind(self) -> str:
        return Path(self.file).suffix.lstrip(".")
