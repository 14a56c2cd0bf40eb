"""Sources of images: a folder, a zip, a tar or a list of paths. The files of each can be listed and read.

A source knows names and bytes; `layout` reads classes and splits from the names. Members of an archive are read in
place and never extracted, so a member called `../../x` cannot be written anywhere. Reading is thread-safe.

Archives may come from untrusted places: the limits here bound what they can make the program read, unpack or keep in
memory.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from wasteddp.errors import SourceError, storage

MAX_MEMBERS = 10_000_000  # while an archive is listed, each member takes about a kilobyte of memory
MAX_HEADER_BYTES = 1 << 20  # of a long name or of PAX fields; tarfile reads all of it into memory
MAX_EXPANSION = 100  # photographs hardly compress: a tar that expands more than this is a decompression bomb

_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
Member = TypeVar("Member")

_COPY_BYTES = 1 << 20
_UNPACKERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}


class BoundedTarInfo(tarfile.TarInfo):
    """Refuses headers that claim to be huge, before they are read. Use: `tarfile.open(..., tarinfo=BoundedTarInfo)`."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _HEADER_TYPES and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {header.size:,} bytes, the limit is {MAX_HEADER_BYTES:,}")
        return header


@dataclass(frozen=True, slots=True)
class File:
    """One file of a source. `stamp` changes with the content: size and time, or the checksum of an archive."""

    path: str  # relative to the source, components separated by "/"
    size_bytes: int
    stamp: str


class Source(Protocol):
    @property
    def files(self) -> Sequence[File]:
        """All files, sorted by path, without hidden files and those that macOS adds to archives."""

    @property
    def folders(self) -> Sequence[str]:
        """All folders that the source names, so that empty ones are detected."""

    def read(self, path: str) -> bytes:
        """Return the bytes of one file. Safe to call from several threads.

        Raises:
            OSError: the file cannot be read.
        """


class FolderSource:
    """A folder and all its subfolders. Symbolic links are followed, each once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        files: list[File] = []
        folders: list[str] = []
        with storage("listing the images", root):
            for where in _walk(root):
                relative = where.relative_to(root).as_posix()
                if where != root:
                    folders.append(relative)
                for entry in os.scandir(where):
                    if not entry.name.startswith(".") and not entry.is_dir():
                        files.append(_stat(Path(entry.path), Path(entry.path).relative_to(root).as_posix()))
        self.files = sorted(files, key=lambda file: file.path)
        self.folders = sorted(folders)

    def read(self, path: str) -> bytes:
        return (self._root / path).read_bytes()


class PathsSource:
    """The files that a table names, relative to `root`. A missing file raises an error when it is read, not here."""

    folders: Sequence[str] = ()

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self._root = root
        self.files = [_stat(root / path, path) for path in sorted(paths)]

    def read(self, path: str) -> bytes:
        return (self._root / path).read_bytes()


class ZipSource:
    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, EOFError) as error:
            raise _broken_archive(path, error) from error
        members = [member for member in _bounded(path, self._zip.infolist()) if not _is_hidden(member.filename)]
        if any(member.flag_bits & 1 for member in members):
            raise SourceError(
                f"{path} is encrypted", "its images cannot be read", "unpack it with its password and give the folder"
            )
        self.files = _last_of_each(
            [
                File(_plain(member.filename), member.file_size, f"{member.file_size}-{member.CRC:08x}")
                for member in members
                if not member.is_dir()
            ],
        )
        self._names = {_plain(member.filename): member for member in members}
        self.folders = sorted({_plain(member.filename) for member in members if member.is_dir()} - {""})

    def read(self, path: str) -> bytes:
        try:
            return self._zip.read(self._names[path])
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:  # CRC, method, cut
            raise OSError(f"damaged member: {error}") from error


class TarSource:
    """An uncompressed tar, read by offset, so that threads can read in parallel."""

    def __init__(self, path: Path, stamp_of: Path) -> None:
        """Args: stamp_of: the file whose time identifies the content: the archive or, if unpacked, the original."""
        try:
            with tarfile.open(path, "r:", tarinfo=BoundedTarInfo) as archive:
                members = [member for member in _bounded(path, archive) if not _is_hidden(member.name)]
        except (tarfile.TarError, EOFError) as error:
            raise _broken_archive(path, error) from error
        time_ns = stamp_of.stat().st_mtime_ns
        regular = [member for member in members if member.isreg() and not member.issparse()]
        self._places = {_plain(member.name): (member.offset_data, member.size) for member in regular}
        self.files = _last_of_each(
            [File(_plain(m.name), m.size, f"{m.size}-{m.offset_data}-{time_ns}") for m in regular]
        )
        self.folders = sorted({_plain(member.name) for member in members if member.isdir()} - {""})
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, path: str) -> bytes:
        offset, size = self._places[path]
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise OSError(f"the archive ends after {len(data)} of this member's {size} bytes")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def open_source(path: Path, *, work_folder: Path) -> Source:
    """Open a folder, zip or tar as a source.

    A compressed tar has no random access: it is unpacked once, to an uncompressed tar in `work_folder`.

    Raises:
        SourceError: the file or folder does not exist, or is not an archive of a known kind.
    """
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise SourceError(
            f"there is no {path}",
            "there are no images to shard",
            "give a folder of class folders, a zip or tar of one, a CSV (path,label), or a recipe (.yaml)",
        )
    with storage("reading the archive", path):
        with path.open("rb") as file:
            start = file.read(6)
        if zipfile.is_zipfile(path):
            return ZipSource(path)
        if start[:2] in _UNPACKERS:
            return TarSource(_unpack(path, work_folder, start[:2]), stamp_of=path)
        if _is_tar(path):
            return TarSource(path, stamp_of=path)
    raise SourceError(
        f"{path} is neither a zip nor a tar (it starts with {start!r})",
        "its images cannot be read",
        "give a folder of class folders, a zip or tar of one, a CSV (path,label), or a recipe (.yaml)",
    )


def is_compressed_tar(path: Path) -> bool:
    with storage("reading the archive", path), path.open("rb") as file:
        return file.read(2) in _UNPACKERS


def _is_tar(path: Path) -> bool:
    """Check the first header only: `tarfile.is_tarfile` reads any length that a header claims."""
    with path.open("rb") as file:
        block = file.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return block == bytes(tarfile.BLOCKSIZE)  # an empty tar consists of its end blocks
    return True


def _unpack(path: Path, work_folder: Path, magic: bytes) -> Path:
    """Unpack a compressed tar completely or not at all: a kill leaves only the temporary file."""
    status = path.stat()
    plain = work_folder / f"source-{status.st_size}-{status.st_mtime_ns}.tar"
    if not plain.exists():
        temporary = plain.with_suffix(".tmp")
        try:
            with _UNPACKERS[magic](path, "rb") as packed, temporary.open("wb") as file:
                most = MAX_EXPANSION * status.st_size + _COPY_BYTES
                while chunk := packed.read(_COPY_BYTES):
                    if file.tell() + len(chunk) > most:
                        raise _too_much(path, f"unpacks to over {MAX_EXPANSION} times its {status.st_size:,} bytes")
                    file.write(chunk)
        except SourceError:
            temporary.unlink()
            raise
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise _broken_archive(path, error) from error
        temporary.replace(plain)
    return plain


def _walk(root: Path) -> Iterator[Path]:
    """Yield `root` and its folders, each once even if links form a cycle."""
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder
        waiting.extend(Path(e.path) for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _stat(file: Path, path: str) -> File:
    try:
        status = file.stat()
    except OSError:  # a dangling link or a missing file: reading it fails, and the image is left out with that reason
        return File(path, 0, "missing")
    return File(path, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def _plain(name: str) -> str:
    """Return a member's name as a path below the source. Components that would lead above it are dropped."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))


def _is_hidden(name: str) -> bool:
    parts = _plain(name).split("/")
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts)


def _last_of_each(files: list[File]) -> list[File]:
    """Return the files by path. Of several members with one name the last counts, as when unpacking."""
    return sorted({file.path: file for file in files}.values(), key=lambda file: file.path)


def _bounded(path: Path, members: Iterable[Member]) -> Iterator[Member]:
    for number, member in enumerate(members):
        if number >= MAX_MEMBERS:
            raise _too_much(path, f"has more than {MAX_MEMBERS:,} members")
        yield member


def _too_much(path: Path, what: str) -> SourceError:
    return SourceError(
        f"the archive {path} {what}",
        "it would fill the disk or the memory; no collection of photographs does that",
        "do not use it; if you trust it, unpack it yourself and give the folder",
    )


def _broken_archive(path: Path, error: Exception) -> SourceError:
    return SourceError(
        f"the archive {path} is damaged: {error}",
        "an unknown part of its images is missing",
        "copy or download it again",
    )
