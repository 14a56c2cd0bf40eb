"""Makes a manifest for tars that webdataset, img2dataset or anything else wrote; the tars themselves are not touched.

A sample is a run of neighbouring members with one key: the name up to the first dot of its last part, as WebDataset has
it. Its label comes from `.cls` (a number or a name) or from `.json`. Nothing is unpickled: other members are not read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wasteddp import __version__
from wasteddp.data.decoding import UndecodableError, decode_gray, is_plain_jpeg, size_px
from wasteddp.data.layout import SPLIT_WORDS, SPLITS, check_classes
from wasteddp.data.limits import BoundedTarInfo
from wasteddp.data.manifest import INDEX_DTYPE, MANIFEST_NAME, LeftOut, Manifest, Shard, Split, write_atomically
from wasteddp.data.parallel import in_order
from wasteddp.data.progress import progress
from wasteddp.data.shard_writer import sha256_of
from wasteddp.errors import ShardError, storage

DEFAULT_LABEL_KEYS = ("label", "class", "cls", "label_name")
_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SPLIT_PREFIX = re.compile(rf"({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    extension: str  # behind the first dot: `seg.png`
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Found:
    """One sample of a tar. `label` is a number or a name, as it stands there."""

    key: str
    offset: int
    length: int
    sha256: bytes
    label: str | int
    problem: LeftOut | None


def index_folder(
    folder: Path,
    *,
    workers: int,
    classes: Sequence[str] = (),
    label_keys: Sequence[str] = DEFAULT_LABEL_KEYS,
    overwrite: bool = False,
) -> Manifest:
    """Writes an index beside each tar, and the manifest.

    Raises:
        ShardError: no tars, a compressed or cut or sparse one, a sample without a label, names and numbers mixed.
    """
    tars = _list_tars(folder, overwrite=overwrite)
    found: dict[Path, list[_Found]] = {}
    with progress("indexing tars", len(tars)) as advance:
        for tar, samples in zip(
            tars, in_order(lambda tar: _read_tar(tar, label_keys), tars, workers=workers), strict=True
        ):
            found[tar] = samples
            advance()
    good = [sample for samples in found.values() for sample in samples if sample.problem is None]
    names = _class_names({sample.label for sample in good}, classes, folder)
    number_of: dict[str | int, int] = {name: number for number, name in enumerate(names)}
    shards: dict[str, list[Shard]] = {}
    counts: dict[str, Counter[int]] = {}
    for tar, samples in found.items():
        kept = [sample for sample in samples if sample.problem is None]
        labels = [s.label if isinstance(s.label, int) else number_of[s.label] for s in kept]
        split = _split_of(tar)
        if kept:
            shards.setdefault(split, []).append(_write_index(tar, kept, labels))
            counts.setdefault(split, Counter()).update(labels)
    splits = {
        split: Split(split, tuple(shards[split]), tuple(counts[split][k] for k in range(len(names))))
        for split in SPLITS
        if split in shards
    }
    left_out = tuple(s.problem for samples in found.values() for s in samples if s.problem is not None)
    recipe = {"indexed": "made by another tool; labels from .cls or .json", "label_keys": list(label_keys)}
    Manifest(
        folder=folder,
        name=folder.resolve().name,
        classes=names,
        splits=splits,
        left_out=left_out,
        recipe=recipe,
        tool=f"wasteddp {__version__}",
    ).save()
    return Manifest.load(folder)


def _list_tars(folder: Path, *, overwrite: bool) -> list[Path]:
    with storage("listing the tars", folder):
        names = sorted(path.name for path in folder.iterdir())
    compressed = [name for name in names if name.endswith(_COMPRESSED)]
    if compressed:
        raise ShardError(
            f"{folder} holds {len(compressed)} compressed tar(s), such as {compressed[0]}",
            "a sample cannot be read from the middle of a compressed file",
            "unpack them (gunzip): JPEGs do not get smaller by it",
        )
    if MANIFEST_NAME in names and not overwrite:
        raise ShardError(
            f"{folder} has a {MANIFEST_NAME} already", "it would be lost", "nothing is to be done, or give --overwrite"
        )
    tars = [folder / name for name in names if name.endswith(".tar")]
    if not tars:
        raise ShardError(
            f"{folder} holds no *.tar ({len(names)} other entries)",
            "there is nothing to index",
            "give the folder in which the tars lie; for images: wasteddp shard",
        )
    return tars


def _read_tar(tar: Path, label_keys: Sequence[str]) -> list[_Found]:
    """All samples of a tar, each image read, hashed and decoded once."""
    with storage("reading a tar", tar), tar.open("rb") as file:
        samples = []
        for key, members in _samples(tar):
            image = _image_of(tar, key, members)
            if image is None:
                continue
            data = os.pread(file.fileno(), image.size, image.offset)
            label = _label_of(tar, key, {m.extension: m for m in members}, file.fileno(), label_keys)
            samples.append(_examined(tar, key, image, data, label))
        if not samples:
            raise ShardError(
                f"{tar} holds no image (.{', .'.join(_IMAGE_EXTENSIONS)})",
                "it is no tar of image samples",
                "move it out of the folder",
            )
        return samples


def _examined(tar: Path, key: str, image: _Member, data: bytes, label: str | int) -> _Found:
    problem = None
    try:
        size_px(data)
        decode_gray(data, min_side_px=64, is_plain=is_plain_jpeg(data))
    except UndecodableError as error:
        problem = LeftOut(f"{tar.name}/{image.name}", error.reason, error.detail)
    return _Found(key, image.offset, image.size, hashlib.sha256(data).digest(), label, problem)


def _samples(tar: Path) -> Iterator[tuple[str, list[_Member]]]:
    """Runs of members with one key, in the tar's order."""
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
                f"{tar}: the members of {key!r} are not neighbours",
                "WebDataset would read them as two samples, and half of them has no label",
                "write the tar with its names sorted (tar --sort=name)",
            )
        seen.add(key)
        current = key
        members.append(member)
    if members:
        yield current, members


def _members(tar: Path) -> Iterator[_Member]:
    """Regular members, GNU and PAX long names resolved.

    Raises:
        ShardError: sparse members, no tar, or a tar that is cut, in a member or between two.
    """
    size_bytes = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:", tarinfo=BoundedTarInfo) as archive:
            for info in archive:
                if info.issparse():
                    raise ShardError(
                        f"{tar}: {info.name} is stored as a sparse file",
                        "its bytes are not in one piece",
                        "write the tar without --sparse",
                    )
                if info.offset_data + info.size > size_bytes:
                    raise _cut(tar, f"in {info.name}, at byte {size_bytes:,}")
                base = info.name.rpartition("/")[2]
                if info.isreg() and "." in base and not base.startswith("."):
                    yield _Member(info.name, base.partition(".")[2].lower(), info.offset_data, info.size)
            end = archive.offset
    except tarfile.ReadError as error:
        raise _cut(tar, str(error)) from error
    with tar.open("rb") as file:
        # A whole tar ends in two blocks of zeros. tarfile, like most readers, takes the end of the file for the end.
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise _cut(tar, f"behind a whole member, at byte {size_bytes:,}")


def _cut(tar: Path, where: str) -> ShardError:
    return ShardError(
        f"{tar} is damaged or cut short: {where}", "an unknown part of it is missing", "copy or download it again"
    )


def _image_of(tar: Path, key: str, members: Sequence[_Member]) -> _Member | None:
    """The image among a sample's members: `a.jpg` rather than `a.mask.png`."""
    images = [m for m in members if m.extension.rpartition(".")[2] in _IMAGE_EXTENSIONS]
    plain = [m for m in images if m.extension in _IMAGE_EXTENSIONS] or images
    if len(plain) > 1:
        raise ShardError(
            f"{tar}: the sample {key!r} has {len(plain)} images: {', '.join(m.name for m in plain)}",
            "which one is to be learned cannot be told",
            "leave one image in each sample (.jpg, .jpeg, .png or .webp)",
        )
    return plain[0] if plain else None


def _label_of(
    tar: Path, key: str, members: dict[str, _Member], descriptor: int, label_keys: Sequence[str]
) -> str | int:
    def read(member: _Member) -> bytes:
        return os.pread(descriptor, member.size, member.offset)

    found: Any = None
    if "cls" in members:
        found = read(members["cls"]).decode("utf-8", "replace").strip()
    elif "json" in members:
        try:
            fields = json.loads(read(members["json"]))
        except ValueError:
            fields = {}
        if isinstance(fields, dict):
            found = next((fields[name] for name in label_keys if name in fields), None)
    if isinstance(found, str) and found:
        return int(found) if found.isdecimal() else found
    if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
        return found
    raise ShardError(
        f"{tar}: the sample {key!r} ({', '.join(members)}) has no label",
        "an image without a class cannot be learned from",
        f"give it a .cls (number or name) or a .json with {' or '.join(label_keys)}; or name the field: --label-key",
    )


def _class_names(labels: set[str | int], classes: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Class names in their order. Numbers without `classes` are named by themselves: 0, 1, 2."""
    numbers = sorted(label for label in labels if isinstance(label, int))
    if not numbers:
        return check_classes({str(label) for label in labels}, classes, folder)
    if len(numbers) < len(labels):
        name = min(label for label in labels if isinstance(label, str))
        raise ShardError(
            f"{folder}: some labels are numbers ({numbers[0]}) and some are names ({name})",
            "one class would become two",
            "write all labels in one way, or choose the field with --label-key",
        )
    names = tuple(classes) or tuple(str(number) for number in range(numbers[-1] + 1))
    if numbers[-1] >= len(names) or len(names) < 2:
        raise ShardError(
            f"{folder} has labels up to {numbers[-1]} and {len(names)} class name(s)",
            "some labels have no name",
            f"name {max(numbers[-1] + 1, 2)} classes with --classes or --classes-from, that numbered 0 first",
        )
    return names


def _split_of(tar: Path) -> str:
    match = _SPLIT_PREFIX.match(tar.name)
    return SPLIT_WORDS[match[1].lower()] if match else "train"


def _write_index(tar: Path, samples: Sequence[_Found], labels: Sequence[int]) -> Shard:
    index = np.zeros(len(samples), INDEX_DTYPE)
    for row, sample, label in zip(index, samples, labels, strict=True):
        row["offset"], row["length"], row["label"] = sample.offset, sample.length, label
        row["sha256"] = np.frombuffer(sample.sha256, np.uint8)
    content = index.tobytes()
    path = tar.with_suffix(".idx")
    write_atomically(path, content)
    return Shard(
        tar=tar.name,
        index=path.name,
        num_samples=len(samples),
        num_bytes=tar.stat().st_size,
        sha256=sha256_of(tar),
        index_sha256=hashlib.sha256(content).hexdigest(),
    )
