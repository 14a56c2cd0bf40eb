"""Archives as sources of images: a zip or a tar. Their files can be listed and read like those of a folder.

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
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from wasteddp.errors import SourceError, storage
from wasteddp.files import open_descriptor, open_regular, read_at
from wasteddp.sharding.sources.files import File, FolderSource, Names, Source, is_ignored

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
_MAX_LINKS = 40  # as Linux: a longer chain of symbolic links is a loop
_UTF8_NAME = 0x800  # flag of a zip member
_IGNORED_NOTE = "ignored {} hidden or system file(s)"
_UNPACKERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}


class BoundedTarInfo(tarfile.TarInfo):
    """Refuses headers that claim to be huge or negative, before `tarfile` uses the size.

    Use: `tarfile.open(..., tarinfo=BoundedTarInfo)`.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError(f"a header claims {header.size:,} bytes")
        if header.type in _HEADER_TYPES and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {header.size:,} bytes, the limit is {MAX_HEADER_BYTES:,}")
        return header


Place = tuple[int, int]  # of a member's bytes in the tar: offset and size


def tar_members(path: Path, archive: tarfile.TarFile) -> list[tuple[tarfile.TarInfo, Place | str]]:
    """Return the members that are not folders, each with its place or with the reason why it has none.

    Links are resolved inside the archive. `tarfile` loops at a header of negative size: it is refused.

    Raises:
        tarfile.ReadError: the tar is damaged.
        SourceError: there are too many members.
    """
    members: list[tarfile.TarInfo] = []
    places: dict[str, Place] = {}
    links: dict[str, str] = {}
    for member in _bounded(path, archive):
        if member.size < 0 or member.offset_data < 0:
            raise tarfile.ReadError(f"{member.name} claims {member.size:,} bytes")
        name = plain_name(member.name)
        members.append(member)
        if member.issym():
            links[name] = _target_of(name, member.linkname)
        elif member.islnk() and (place := places.get(plain_name(member.linkname))):
            places[name] = place
        elif member.isreg() and not member.issparse():
            places[name] = member.offset_data, member.size
    with open_regular(path) as file:
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # for `tarfile`, a damaged header is the end
            raise tarfile.ReadError(f"no header of a member at byte {archive.offset:,}")
    return [(member, _place(member, places, links)) for member in members if not member.isdir()]


def _target_of(name: str, link: str) -> str:
    """Return the name that a symbolic link leads to, or "" if it leads out of the archive."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
    return "" if target.startswith(("/", "..")) else target


def _place(member: tarfile.TarInfo, places: Mapping[str, Place], links: Mapping[str, str]) -> Place | str:
    if member.issparse():
        return "it is stored as a sparse file"
    if member.isreg():
        return member.offset_data, member.size
    if not (member.issym() or member.islnk()):
        return "it is a pipe or a device, not a file"
    name = plain_name(member.name)
    for _ in range(_MAX_LINKS if member.issym() else 0):
        name = links.get(name, name)
    return places.get(name, f"it is a link to {member.linkname}, which is not a file in the archive")


class ZipSource:
    def __init__(self, path: Path, *, ignore: Sequence[str] = (), encoding: str = "") -> None:
        with _readable(path):
            self._zip = zipfile.ZipFile(path)
        self._names: dict[str, zipfile.ZipInfo] = {}
        ignored = Names()
        folders: set[str] = set()
        for member in _bounded(path, self._zip.infolist()):
            name = plain_name(_decoded(path, member, encoding))
            if not member.filename:
                raise _broken_archive(path, ValueError("it has a member without a name"))
            if is_ignored(name, ignore):
                ignored.add(name)
            elif member.flag_bits & 1:
                raise SourceError(
                    f"{path} is encrypted",
                    "its images cannot be read",
                    "unpack it with its password and give the folder",
                )
            elif member.filename.endswith("/"):
                folders.add(name)
            else:
                self._names[name] = member
        self.files = [File(name, m.file_size, f"{m.file_size}-{m.CRC:08x}") for name, m in sorted(self._names.items())]
        self.folders = sorted(folders - {""})
        self.notes = ignored.note(_IGNORED_NOTE)

    def read(self, path: str) -> bytes:
        try:
            return self._zip.read(self._names[path])
        except OSError:
            raise
        except Exception as error:  # of the decompressor, or a wrong checksum, method or header
            raise OSError(f"damaged member: {error}") from error


class TarSource:
    """An uncompressed tar, read by offset, so that threads can read in parallel."""

    def __init__(self, path: Path, stamp_of: Path, *, ignore: Sequence[str] = (), encoding: str = "") -> None:
        """Args: stamp_of: the file whose time identifies the content: the archive or, if unpacked, the original."""
        with (
            _readable(path),
            tarfile.open(path, "r:", tarinfo=BoundedTarInfo, encoding=encoding or "utf-8") as archive,
        ):
            members = tar_members(path, archive)
            folders = {plain_name(member.name) for member in archive.getmembers() if member.isdir()}
        time_ns = stamp_of.stat().st_mtime_ns
        self._places: dict[str, Place | str] = {}
        ignored = Names()
        for member, place in members:
            name = plain_name(member.name)
            if is_ignored(name, ignore):
                ignored.add(name)
            else:
                self._places[name] = place
        self.files = [
            File(name, 0, place) if isinstance(place, str) else File(name, place[1], f"{place[1]}-{place[0]}-{time_ns}")
            for name, place in sorted(self._places.items())
        ]
        self.folders = sorted(name for name in folders if name and not is_ignored(name, ignore))
        self.notes = ignored.note(_IGNORED_NOTE)
        self._descriptor = open_descriptor(path)

    def read(self, path: str) -> bytes:
        place = self._places[path]
        if isinstance(place, str):
            raise OSError(place)
        offset, size = place
        data = read_at(self._descriptor, size, offset)
        if len(data) != size:
            raise OSError(f"the archive ends after {len(data)} of this member's {size} bytes")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def open_source(path: Path, *, work_folder: Path, ignore: Sequence[str] = (), encoding: str = "") -> Source:
    """Open a folder, zip or tar as a source.

    A compressed tar has no random access: it is unpacked once, to an uncompressed tar in `work_folder`.

    Args:
        ignore: patterns of names to ignore, besides `IGNORED`.
        encoding: of the names in an archive, if it is not UTF-8.

    Raises:
        SourceError: the file or folder does not exist, is not an archive of a known kind, is damaged, or has names in
            another encoding.
    """
    if path.is_dir():
        return FolderSource(path, ignore=ignore)
    if not path.exists():
        raise SourceError(
            f"there is no {path}",
            "there are no images to shard",
            "give a folder of class folders, a zip or tar of one, a CSV (path,label), or a recipe (.yaml)",
        )
    with storage("reading the archive", path):
        with open_regular(path) as file:
            start = file.read(6)
        if zipfile.is_zipfile(path):
            return ZipSource(path, ignore=ignore, encoding=encoding)
        if start[:2] in _UNPACKERS:
            plain = _unpack(path, work_folder, start[:2])
            return TarSource(plain, stamp_of=path, ignore=ignore, encoding=encoding)
        if _is_tar(path):
            return TarSource(path, stamp_of=path, ignore=ignore, encoding=encoding)
    if start.startswith(b"PK\x03\x04"):
        raise SourceError(
            f"{path} begins as a zip, and its list of files at the end is missing or damaged",
            "its images cannot be found",
            "copy or download it again: it may be incomplete",
        )
    raise SourceError(
        f"{path} is neither a zip nor a tar (it starts with {start!r})",
        "its images cannot be read",
        "give a folder of class folders, a zip or tar of one, a CSV (path,label), or a recipe (.yaml)",
    )


def is_compressed_tar(path: Path) -> bool:
    with storage("reading the archive", path), open_regular(path) as file:
        return file.read(2) in _UNPACKERS


def _is_tar(path: Path) -> bool:
    """Check the first header only: `tarfile.is_tarfile` reads any length that a header claims."""
    with open_regular(path) as file:
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
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise _broken_archive(path, error) from error
        temporary.replace(plain)
    return plain


def plain_name(name: str) -> str:
    """Return a member's name as a path below the source. Components that would lead above it are dropped."""
    if name.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in name):
        name = name.replace("\\", "/")  # of Windows; in a name that is not UTF-8, this byte may be part of a letter
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _decoded(path: Path, member: zipfile.ZipInfo, encoding: str) -> str:
    """Return the name of a member. Without the flag for UTF-8, a zip does not say how its names are encoded."""
    if member.flag_bits & _UTF8_NAME or member.orig_filename.isascii():
        return member.filename
    raw = member.orig_filename.encode("cp437")
    try:
        return raw.decode(encoding or "utf-8")
    except (UnicodeDecodeError, LookupError) as error:
        raise SourceError(
            f"{path} has names that are not {encoding or 'UTF-8'}, such as {raw!r}",
            "classes would get wrong names, and two could become one",
            "give --encoding: cp932 (Japanese Windows), gbk (Chinese), euc_kr (Korean), cp437 or cp1252 (western)",
        ) from error


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


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Report any error that the readers of an archive raise: they are made for good archives."""
    try:
        yield
    except (OSError, SourceError):
        raise
    except Exception as error:
        raise _broken_archive(path, error) from error


def _broken_archive(path: Path, error: Exception) -> SourceError:
    return SourceError(
        f"the archive {path} is damaged: {error}",
        "an unknown part of its images is missing",
        "copy or download it again",
    )
