"""Read the samples, images and labels of a tar that webdataset, img2dataset or another tool wrote.

A sample is a run of consecutive members with one key: the name up to the first dot of its last component, as in
WebDataset. Its label comes from `.cls` (a number or a name) or from `.json`. Other members are not read, and nothing is
unpickled. Links are resolved inside the tar. A sample whose image or label is missing is left out or refused.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasteddp.data.decoding.decode import UndecodableError, check_image
from wasteddp.data.decoding.formats import IMAGE_SUFFIXES
from wasteddp.data.manifest import LeftOut
from wasteddp.errors import ShardError, WastedError, storage
from wasteddp.files import open_regular, read_at, sha256_of
from wasteddp.sharding.scan import MAX_FILE_BYTES
from wasteddp.sharding.sources.archives import BoundedTarInfo, tar_members
from wasteddp.sharding.sources.files import is_ignored

_USUAL_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # others count only in a sample without one of these
_OTHER_EXTENSIONS = tuple(sorted({suffix[1:] for suffix in IMAGE_SUFFIXES} - set(_USUAL_EXTENSIONS)))
_MOST_NAMES = 4  # in a message
_LABEL_EXTENSIONS = ("cls", "json")
_MAX_LABEL_BYTES = 16 << 20
_MAX_LABEL = 999_999  # each number up to the largest becomes a class


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    extension: str  # after the first dot: `seg.png`
    offset: int
    size: int
    problem: str = ""  # why it has no bytes


@dataclass(frozen=True, slots=True)
class TarSample:
    """One sample of a tar. `label` is a number or a name, as the tar has it."""

    key: str
    offset: int
    length: int
    sha256: bytes
    label: str | int
    problem: LeftOut | None
    is_tolerated: bool = False  # see `decode.Checked`


@dataclass(frozen=True, slots=True)
class ReadTar:
    """A tar that was read to its end."""

    name: str
    num_bytes: int
    sha256: str
    samples: tuple[TarSample, ...]


@dataclass(frozen=True, slots=True)
class _Tar:
    """The path of a tar, and its name in messages."""

    path: Path
    where: str
    name: str

    def __str__(self) -> str:
        return self.where


def read_tar(path: Path, label_keys: Sequence[str], *, where: str = "", name: str = "") -> ReadTar:
    """Read all samples of a tar. Each image is read, hashed and decoded once.

    Args:
        where: name of the tar in messages; by default its path.
        name: of the tar in the set; by default its file name.

    Raises:
        ShardError: the tar is truncated, has sparse members or no images, or a sample does not have one image and one
            label.
    """
    tar = _Tar(path, where or str(path), name or path.name)
    with storage("reading a tar", path), open_regular(path) as file:
        samples = []
        for key, members in _samples(tar):
            image = _image_of(tar, key, members)
            extensions = {member.extension: member for member in members}
            if image is None:
                if any(extension in _LABEL_EXTENSIONS for extension in extensions):
                    detail = f"it has a label but no image ({', '.join(extensions)})"
                    samples.append(_left_out(tar, key, key, "unreadable", detail))
                continue
            label = _label_of(tar, key, extensions, file.fileno(), label_keys)
            samples.append(_examine(tar, key, image, file.fileno(), label))
        if not any(sample.length for sample in samples):
            raise ShardError(
                f"{tar} holds no image (.{', .'.join((*_USUAL_EXTENSIONS, *_OTHER_EXTENSIONS))})",
                "it is not a tar of image samples",
                "move it out of the folder",
            )
        return ReadTar(tar.name, path.stat().st_size, sha256_of(path), tuple(samples))


def _examine(tar: _Tar, key: str, image: _Member, descriptor: int, label: str | int) -> TarSample:
    if image.problem:
        return _left_out(tar, key, image.name, "unreadable", image.problem)
    if image.size > MAX_FILE_BYTES:
        detail = f"{image.size:,} bytes, the limit is {MAX_FILE_BYTES:,}"
        return _left_out(tar, key, image.name, "too_large", detail)
    data = read_at(descriptor, image.size, image.offset)
    problem, is_tolerated = None, False
    try:
        is_tolerated = check_image(data).is_tolerated
    except UndecodableError as error:
        problem = LeftOut(f"{tar.name}/{image.name}", error.reason, error.detail)
    return TarSample(key, image.offset, image.size, hashlib.sha256(data).digest(), label, problem, is_tolerated)


def _left_out(tar: _Tar, key: str, name: str, reason: str, detail: str) -> TarSample:
    return TarSample(key, 0, 0, bytes(32), "", LeftOut(f"{tar.name}/{name}", reason, detail))


def _samples(tar: _Tar) -> Iterator[tuple[str, list[_Member]]]:
    """Yield the runs of members with one key, in the tar's order."""
    seen: set[str] = set()
    current, members = "", list[_Member]()
    for member in _members(tar):
        folder, _, base = member.name.rpartition("/")
        stem, _, _ = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if members and key != current:
            yield current, members
            members = []
        if not members and key in seen:
            raise ShardError(
                f"{tar}: the members of {key!r} are not consecutive",
                "WebDataset would read them as two samples, one of which may have no label",
                "write the tar with sorted names (tar --sort=name)",
            )
        seen.add(key)
        current = key
        members.append(member)
    if members:
        yield current, members


def _members(tar: _Tar) -> Iterator[_Member]:
    """Yield the members that have an extension; long names of GNU and PAX are resolved, and links.

    Raises:
        ShardError: the file is not a tar, has sparse members, or is truncated, in a member or between two.
    """
    size_bytes = tar.path.stat().st_size
    try:
        with tarfile.open(tar.path, "r:", tarinfo=BoundedTarInfo, encoding="utf-8") as archive:
            members = tar_members(tar.path, archive)
            end = archive.offset
    except (OSError, WastedError):
        raise
    except Exception as error:  # `tarfile` is made for good tars
        raise _cut_error(tar, str(error)) from error
    for info, place in members:
        if info.issparse():
            raise ShardError(
                f"{tar}: {info.name} is stored as a sparse file",
                "its bytes are not contiguous in the file",
                "write the tar without --sparse",
            )
        offset, size, problem = (0, 0, place) if isinstance(place, str) else (*place, "")
        if offset + size > size_bytes:
            raise _cut_error(tar, f"in {info.name}, at byte {size_bytes:,}")
        base = info.name.rpartition("/")[2]
        if "." in base and not is_ignored(info.name):
            yield _Member(info.name, base.partition(".")[2].lower(), offset, size, problem)
    with open_regular(tar.path) as file:
        # A complete tar ends in two blocks of zeros. tarfile, like most readers, also accepts the end of the file.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise _cut_error(tar, f"after a whole member, at byte {size_bytes:,}")


def _cut_error(tar: _Tar, where: str) -> ShardError:
    return ShardError(
        f"{tar} is damaged or truncated: {where}", "an unknown part of it is missing", "copy or download it again"
    )


def _image_of(tar: _Tar, key: str, members: Sequence[_Member]) -> _Member | None:
    """Return the image among a sample's members. `a.jpg` has precedence over `a.tiff`, and both over `a.mask.png`."""
    candidates = (
        [m for m in members if (m.extension.rpartition(".")[2] if is_last else m.extension) in extensions]
        for is_last in (False, True)
        for extensions in (_USUAL_EXTENSIONS, _OTHER_EXTENSIONS)
    )
    plain = next(filter(None, candidates), [])
    if len(plain) > 1:
        raise ShardError(
            f"{tar}: the sample {key!r} has {len(plain):,} images: {_some_of([m.name for m in plain])}",
            "it is not clear which image belongs to the label",
            "keep one image in each sample; if these are different samples, write their names without dots: WebDataset "
            "ends the key of a sample at the first dot",
        )
    return plain[0] if plain else None


def _some_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _label_of(
    tar: _Tar, key: str, members: dict[str, _Member], descriptor: int, label_keys: Sequence[str]
) -> str | int:
    def read(member: _Member) -> bytes:
        return read_at(descriptor, member.size, member.offset) if member.size <= _MAX_LABEL_BYTES else b""

    found: Any = None
    if "cls" in members:
        found = read(members["cls"]).decode("utf-8-sig", "surrogateescape")
    elif "json" in members:
        try:
            fields = json.loads(read(members["json"]))
        except (ValueError, RecursionError):
            fields = {}
        if isinstance(fields, dict):
            found = next((fields[name] for name in label_keys if name in fields), None)
    found = found.strip() if isinstance(found, str) else found
    if isinstance(found, str) and found and not found.isdecimal():
        return found
    if isinstance(found, str) and found:
        found = int(found) if len(found) < 100 else _MAX_LABEL + 1
    if isinstance(found, int) and found > _MAX_LABEL:
        raise ShardError(
            f"{tar}: the sample {key!r} has the label number {found:,}, the limit is {_MAX_LABEL:,}",
            "each number up to it would be a class",
            "number the classes from 0, or write names as labels",
        )
    if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
        return found
    raise ShardError(
        f"{tar}: the sample {key!r} ({_some_of(list(members))}) has no label",
        "the model cannot learn from an image without a class",
        f"add a .cls (number or name) or a .json with {' or '.join(label_keys)}, or name the field with --label-key",
    )
