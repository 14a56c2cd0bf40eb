"""The contents of a shard set: reading, writing and checking `manifest.json` and the binary index of each shard.

Legend: N samples of a split, K classes. This module does not open tars or decode images.

    shards/trashnet/manifest.json       classes, splits and shards, hashes of all other files, images left out and why
    shards/trashnet/train-000000.tar    members <key>.jpg, <key>.json
    shards/trashnet/train-000000.idx    one record of INDEX_DTYPE for each sample, in the order of the tar
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from wasteddp.errors import ShardError, storage
from wasteddp.files import read_regular, write_atomically

FORMAT = "wasteddp-shards"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
FOLD_PREFIX = "fold-"  # of the splits of a set for cross-validation
WORK_NAME = ".sharding"  # folder of a set that is not finished
BEGUN_NAME = "begun"  # if it exists there, files in the set's folder with our names were written by us
_SHA256 = re.compile("[0-9a-f]{64}")

# Little-endian and packed, 48 bytes a sample: the file is the same on every machine.
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the image's first byte in the tar
        ("length", "<u4"),  # of the image, bytes
        ("label", "<i4"),  # 0 .. K-1
        ("sha256", "u1", (32,)),  # of the image's bytes as stored
    ]
)
Index = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar and its index; the file names are relative to the set's folder."""

    tar: str
    index: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, slots=True)
class Split:
    name: str
    shards: tuple[Shard, ...]
    samples_per_class: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An image of the source that was not put into a shard. `reason` is one of `REASONS`."""

    source: str
    reason: str
    detail: str


REASONS = (
    "unreadable",  # no decoder accepts it, or the file cannot be read
    "truncated",  # the decoder ran out of bytes
    "empty",  # zero bytes
    "too_large",  # more pixels or bytes than the limit: a decompression bomb or a mistake
    "duplicate",  # the same bytes as another image of the same class, which is kept
    "conflicting_label",  # the same bytes occur in two classes; none of the images is kept
    "not_listed",  # list files were given and do not name it
    "unknown_range",  # more than 8 bits, and the values of black and white are not stated
    "dropped",  # a file of corrections drops it
)


Record = TypeVar("Record", Shard, LeftOut)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A shard set.

    `sha256` is the hash of `manifest.json`, which contains the hashes of all files, so it identifies the whole set.
    `folder` holds the files of the set; for a set at a URL, it is the cache.
    """

    folder: Path
    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    bins: Mapping[str, str] = field(default_factory=dict)  # class -> waste bin for it; may be empty
    left_out: tuple[LeftOut, ...] = ()
    near_duplicates: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)  # the record of their file; empty: there are none
    num_tolerated: int = 0  # JPEGs with faults that cost no pixel
    recipe: Mapping[str, Any] = field(default_factory=dict)  # source, licence, citation and options of its creation
    tool: str = ""
    sha256: str = ""
    url: str = ""  # without passwords; empty for a folder

    @property
    def where(self) -> str:
        """Folder or URL, for messages."""
        return self.url or str(self.folder)

    def split(self, name: str) -> Split:
        """Return the split called `name`.

        Raises:
            ShardError: there is no such split, or it is empty; the message lists the splits.
        """
        if name not in self.splits or self.splits[name].num_samples == 0:
            there = ", ".join(f"{s.name} ({s.num_samples})" for s in self.splits.values()) or "none"
            has_folds = any(other.startswith(FOLD_PREFIX) for other in self.splits)
            raise ShardError(
                f"{self.where} has no samples in a split called {name!r}; its splits: {there}",
                "there would be nothing to read",
                "set data.fold to the fold to validate on, such as --set data.fold=0, or train all: wasteddp folds"
                if has_folds
                else "use one of its splits, or shard the images again with a split of that name",
            )
        return self.splits[name]

    def to_json(self) -> str:
        """Return the text of `manifest.json`; its keys are in the order written here, not sorted."""
        return (
            json.dumps(
                {
                    "format": FORMAT,
                    "format_version": FORMAT_VERSION,
                    "tool": self.tool,
                    "name": self.name,
                    "classes": list(self.classes),
                    "bins": dict(self.bins),
                    "splits": {
                        split.name: {
                            "num_samples": split.num_samples,
                            "samples_per_class": list(split.samples_per_class),
                            "shards": [asdict(shard) for shard in split.shards],
                        }
                        for split in self.splits.values()
                    },
                    "near_duplicates": dict(self.near_duplicates),
                    **({"groups": dict(self.groups)} if self.groups else {}),
                    **({"num_tolerated": self.num_tolerated} if self.num_tolerated else {}),
                    "recipe": dict(self.recipe),
                    "left_out": [asdict(left) for left in self.left_out],
                },
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )

    def save(self) -> None:
        """Write `manifest.json` atomically. Write it last, since its presence means that the set is complete."""
        # A byte of a file name that is not UTF-8 becomes \udcXX: json.loads makes Python's name of that file of it.
        write_atomically(self.folder / MANIFEST_NAME, self.to_json().encode("utf-8", "backslashreplace"))

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read and check a manifest. The tars are checked when they are opened, and by `wasteddp verify`.

        Raises:
            ShardError: the folder or the manifest does not exist, the format is unknown, or the counts are
                inconsistent.
        """
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        if folder.is_file():
            raise ShardError(
                f"{folder} is a file, not the folder of a shard set",
                "there are no shards to read",
                f"if it holds images, run `wasteddp shard {folder} --out shards/NAME` and name that folder; if it is a "
                "tar of a set, name its folder",
            )
        if not folder.is_dir():
            raise ShardError(
                f"there is no folder {folder}" + ("" if folder.is_absolute() else f" in {Path.cwd()}"),
                "there is nothing to read",
                f"create the shards first (wasteddp shard SOURCE --out {folder}), or "
                "name their folder: data.shards in the settings, --shards in commands",
            )
        if not path.exists():
            tars = len(list(folder.glob("*.tar")))
            if (folder / WORK_NAME / BEGUN_NAME).exists():
                raise ShardError(
                    f"{folder} holds a set that `wasteddp shard` has begun and not finished",
                    "a part of the images would be missing",
                    "run the same `wasteddp shard` again: it continues",
                )
            if not tars and any(entry.is_dir() for entry in folder.iterdir()):
                raise ShardError(
                    f"{folder} holds no {MANIFEST_NAME} and no tar, but folders",
                    "a run reads shards, not images",
                    f"if it holds class folders, run `wasteddp shard {folder} --out shards/NAME` and name that folder",
                )
            raise ShardError(
                f"{folder} holds {tars} tar file(s) but no {MANIFEST_NAME}",
                "without it the number of samples is unknown, so no epoch could be checked for completeness",
                f"if another tool created the tars, run `wasteddp index {folder}`; if `wasteddp shard` stopped, run it "
                "again",
            )
        with storage("reading the manifest", path):
            text = read_regular(path)
        return cls.parse(text, folder)

    @classmethod
    def parse(cls, text: bytes, folder: Path, *, url: str = "") -> Manifest:
        """Return the manifest in `text`.

        Args:
            text: content of `manifest.json`.
            folder: of the set's files.
            url: of the set, if it is not a folder.

        Raises:
            ShardError: the format is unknown, or the counts are inconsistent.
        """
        try:
            return cls._parse(text, folder, url)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ShardError(
                f"{url or folder}/{MANIFEST_NAME} is not a manifest of this format: {type(error).__name__}: {error}",
                "its description of the shards cannot be trusted",
                "create the set again with `wasteddp shard` or `wasteddp index`",
            ) from error

    @classmethod
    def _parse(cls, text: bytes, folder: Path, url: str) -> Manifest:
        raw = json.loads(text)
        if raw.get("format") != FORMAT or raw.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"format {raw.get('format')!r} version {raw.get('format_version')!r}, not {FORMAT!r} {FORMAT_VERSION}"
            )
        classes = raw["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes):
            raise TypeError(f"the classes {classes!r:.200} are not a list of names")
        if len(set(classes)) < len(classes):
            raise ValueError(f"a class is named twice: {max(classes, key=classes.count)}")
        "".join(classes).encode()  # a ValueError if one is not UTF-8
        splits = {}
        for name, part in raw["splits"].items():
            shards = tuple(_typed(Shard(**shard)) for shard in part["shards"])
            split = Split(name, shards, tuple(_counted(number) for number in part["samples_per_class"]))
            if not split.num_samples == part["num_samples"] == sum(split.samples_per_class):
                raise ValueError(f"the sample counts of split {name!r} do not add up")
            if len(split.samples_per_class) != len(classes):
                raise ValueError(f"split {name!r} has counts of {len(split.samples_per_class)} classes")
            for file in (f for shard in split.shards for f in (shard.tar, shard.index)):
                if not is_inside(file):
                    raise ValueError(f"{file!r} is not a plain file name")
            for sha256 in (s for shard in split.shards for s in (shard.sha256, shard.index_sha256)):
                if not _SHA256.fullmatch(sha256):  # a cache uses it as a file name
                    raise ValueError(f"{sha256!r} is not a sha256")
            splits[name] = split
        groups = raw.get("groups", {})
        if groups and not (is_inside(groups["file"]) and _SHA256.fullmatch(groups["sha256"]) and groups["rule"]):
            raise ValueError(f"{groups!r:.200} is not a record of groups")
        if groups:
            _counted(groups["num_groups"])
            _counted(groups["num_bytes"])
        for key, kind in (("name", str), ("tool", str), ("bins", dict), ("near_duplicates", dict), ("recipe", dict)):
            if not isinstance(raw[key], kind):
                raise TypeError(f"{key} is {raw[key]!r:.100}")
        if not all(isinstance(bin_name, str) for bin_name in raw["bins"].values()):
            raise TypeError(f"the bins {raw['bins']!r:.200} are not all names")
        fractions = (raw["recipe"].get("options") or {}).get("fractions") or [0, 0, 0]
        if len(fractions) != 3 or not all(isinstance(number, (int, float)) for number in fractions):
            raise TypeError(f"the fractions of the splits are {fractions!r:.100}")
        _check_near(raw["near_duplicates"], splits)
        return cls(
            folder=folder,
            name=raw["name"],
            classes=tuple(classes),
            splits=splits,
            bins=raw["bins"],
            left_out=tuple(_typed(LeftOut(**left)) for left in raw["left_out"]),
            near_duplicates=raw["near_duplicates"],
            groups=groups,
            num_tolerated=_counted(raw.get("num_tolerated", 0)),
            recipe=raw["recipe"],
            tool=raw["tool"],
            sha256=hashlib.sha256(text).hexdigest(),
            url=url,
        )


def _check_near(near: Mapping[str, Any], splits: Collection[str]) -> None:
    """Check the record of near-duplicates; an indexed set has none."""
    for where, counts in near.get("across_splits", {}).items():
        if _counted(counts["pairs"]):
            other = next((name for name in splits if where.endswith(f"-{name}")), "")
            _counted(counts[f"{other}_images"])
    for pair in near.get("pairs", []):
        if not (isinstance(pair, list) and len(pair) == 5 and all(isinstance(word, str) for word in pair[:4])):
            raise TypeError(f"{pair!r:.200} is not a pair of near-duplicates")
    _counted(near.get("largest_chain", 0))


def _typed(record: Record) -> Record:
    """Return a record of texts and counts, after a check of their types."""
    for one in fields(record):
        value = getattr(record, one.name)
        if one.type == "int":
            _counted(value)
        elif not isinstance(value, str):
            raise TypeError(f"{one.name} is {value!r:.100}, not a text")
    return record


def _counted(number: object) -> int:
    if type(number) is not int or number < 0:
        raise TypeError(f"{number!r:.100} is not a count")
    return number


def fold_name(number: int) -> str:
    """Return the name of a fold's split; the run that validates on it has a folder of this name."""
    return f"{FOLD_PREFIX}{number}"


def shared_shards(manifest: Manifest, names: Iterable[str] | None = None) -> list[str]:
    """Name each tar that is in two splits, by its name or by its content.

    Args:
        names: of the splits; by default all.
    """
    found = list[str]()
    first = dict[str, tuple[str, Shard]]()  # by name and by sha256
    for name in manifest.splits if names is None else dict.fromkeys(names):
        for shard in manifest.splits[name].shards:
            for key in (shard.tar, shard.sha256) if shard.num_samples else ():
                split, other = first.setdefault(key, (name, shard))
                if split != name:
                    found.append(f"{shard.tar} of split {name} is {other.tar} of split {split}")
                    break
    return found


def pad_size(num_bytes: int, unit: int = BLOCKSIZE) -> int:
    """What a tar's member of that size takes, without its header; or anything else that is padded to a `unit`."""
    return -(-num_bytes // unit) * unit


def write_index(path: Path, records: Iterable[tuple[int, int, int, bytes]]) -> str:
    """Writes records of (offset, length, label, sha256), atomically; returns the sha256 of the file."""
    rows = [(*record, np.frombuffer(sha256, np.uint8)) for *record, sha256 in records]
    content = np.array(rows, INDEX_DTYPE).tobytes()
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def is_inside(file: str) -> bool:
    """Return whether this is a plain file name, or one in a folder of the set: `train/000.tar`."""
    parts = file.split("/")
    return len(parts) <= 2 and not any(part in ("", ".", "..") or "\0" in part for part in parts)


def read_index(folder: Path, shard: Shard, *, check: bool = True) -> Index:
    """Return the index of one shard: a read-only array of `num_samples` records.

    Raises:
        ShardError: the file is missing, or its length or sha256 differs from the manifest's.
    """
    path = folder / shard.index
    try:
        text = read_regular(path)
    except OSError as error:
        raise ShardError(
            f"the index {path} cannot be read: {error.strerror}",
            f"{shard.num_samples} samples of {shard.tar} cannot be located",
            "copy the whole set again, or create it again with `wasteddp shard` or `wasteddp index`",
        ) from error
    return parse_index(text, shard, path, check=check)


def parse_index(text: bytes, shard: Shard, where: str | Path, *, check: bool = True) -> Index:
    """Do as `read_index`, from the bytes of the index; `where` is their path or URL, for messages."""
    found = hashlib.sha256(text).hexdigest() if check else shard.index_sha256
    if len(text) != shard.num_samples * INDEX_DTYPE.itemsize or found != shard.index_sha256:
        raise ShardError(
            f"the index {where} has {len(text)} bytes and sha256 {found[:12]}; in the manifest it has "
            f"{shard.num_samples * INDEX_DTYPE.itemsize} bytes and {shard.index_sha256[:12]}",
            "samples would be read from the wrong places",
            "copy the whole set again, or create it again with `wasteddp shard` or `wasteddp index`",
        )
    return np.frombuffer(text, dtype=INDEX_DTYPE)
