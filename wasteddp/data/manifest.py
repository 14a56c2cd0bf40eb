"""What a shard set contains: `manifest.json` and one binary index a shard, read, written and checked.

Legend: N samples of a split, K classes. Pure files and numpy; nothing here opens a tar or decodes an image.

    shards/trashnet/manifest.json       everything below, hashes of all other files, what was left out and why
    shards/trashnet/train-000000.tar    members <key>.jpg, <key>.json
    shards/trashnet/train-000000.idx    one record of INDEX_DTYPE a sample, in the tar's order
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.errors import ShardError, storage
from wasteddp.files import write_atomically

FORMAT = "wasteddp-shards"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_SHA256 = re.compile("[0-9a-f]{64}")

# Little-endian and packed: 48 bytes a sample, the same file on every machine.
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
    """One tar and its index: file names relative to the set's folder."""

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
    """An image of the source that is in no shard. `reason` is one of `REASONS`."""

    source: str
    reason: str
    detail: str


REASONS = (
    "unreadable",  # no decoder takes it, or the file cannot be read
    "truncated",  # the decoder ran out of bytes
    "empty",  # zero bytes
    "too_large",  # more pixels or bytes than the limit: a decompression bomb or a mistake
    "duplicate",  # the same bytes as another image of the same class, which is kept
    "conflicting_label",  # the same bytes stand under two classes: none of them is kept
    "not_listed",  # list files were given and none names it
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A shard set. `sha256` is that of `manifest.json` itself: it names the whole set, bytes and all.

    `folder` is where its files are; of a set behind a URL, the cache that they are fetched into.
    """

    folder: Path
    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    bins: Mapping[str, str] = field(default_factory=dict)  # class -> bin it is thrown into; may be empty
    left_out: tuple[LeftOut, ...] = ()
    near_duplicates: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)  # source, licence, citation, options: how it was made
    tool: str = ""
    sha256: str = ""
    url: str = ""  # without passwords; empty where the set is a folder

    @property
    def where(self) -> str:
        """Folder or URL, for messages."""
        return self.url or str(self.folder)

    def split(self, name: str) -> Split:
        """The split called `name`, or an error that lists those there are."""
        if name not in self.splits or self.splits[name].num_samples == 0:
            there = ", ".join(f"{s.name} ({s.num_samples})" for s in self.splits.values()) or "none"
            raise ShardError(
                f"{self.where} has no samples in a split called {name!r}; splits there: {there}",
                "there would be nothing to read",
                "name another split, or shard the images again with a split of that name",
            )
        return self.splits[name]

    def to_json(self) -> str:
        """The text of `manifest.json`: sorted nowhere, so that its order is the order written here."""
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
                    "recipe": dict(self.recipe),
                    "left_out": [asdict(left) for left in self.left_out],
                },
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )

    def save(self) -> None:
        """Writes `manifest.json` atomically. Call it last: a set with a manifest is a whole set."""
        # A byte of a file name that is not UTF-8 becomes \udcXX: json.loads makes Python's name of that file of it.
        write_atomically(self.folder / MANIFEST_NAME, self.to_json().encode("utf-8", "backslashreplace"))

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Reads and checks a manifest; the tars themselves are checked when they are opened, or by `wasteddp verify`.

        Raises:
            ShardError: no such folder, no manifest in it, another format, or counts that contradict each other.
        """
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        if not folder.is_dir():
            raise ShardError(
                f"there is no folder {folder}",
                "there is nothing to read",
                f"make the shards first (wasteddp shard SOURCE --out {folder}), or set data.shards to where they are",
            )
        if not path.exists():
            tars = len(list(folder.glob("*.tar")))
            raise ShardError(
                f"{folder} holds {tars} tar file(s) but no {MANIFEST_NAME}",
                "without it nobody knows how many samples there are, so no epoch could be proved whole",
                f"if another tool made the tars: wasteddp index {folder}; if `wasteddp shard` stopped: run it again",
            )
        with storage("reading the manifest", path):
            text = path.read_bytes()
        return cls.parse(text, folder)

    @classmethod
    def parse(cls, text: bytes, folder: Path, *, url: str = "") -> Manifest:
        """The manifest that stands in `text`.

        Raises:
            ShardError: another format, or counts that contradict each other.
        """
        try:
            return cls._parse(text, folder, url)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ShardError(
                f"{url or folder}/{MANIFEST_NAME} is not a manifest of this format: {type(error).__name__}: {error}",
                "what it says of the shards cannot be trusted",
                "make the set again with `wasteddp shard` or `wasteddp index`",
            ) from error

    @classmethod
    def _parse(cls, text: bytes, folder: Path, url: str) -> Manifest:
        raw = json.loads(text)
        if raw.get("format") != FORMAT or raw.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format {raw.get('format')!r} version {raw.get('format_version')!r}, wanted {FORMAT!r} 1")
        classes = raw["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes):
            raise TypeError(f"the classes {classes!r:.200} are not a list of names")
        if len(set(classes)) < len(classes):
            raise ValueError(f"a class is named twice: {max(classes, key=classes.count)}")
        "".join(classes).encode()  # a ValueError if one is not UTF-8
        splits = {}
        for name, part in raw["splits"].items():
            split = Split(name, tuple(Shard(**shard) for shard in part["shards"]), tuple(part["samples_per_class"]))
            if not split.num_samples == part["num_samples"] == sum(split.samples_per_class):
                raise ValueError(f"split {name!r} does not add up")
            if len(split.samples_per_class) != len(classes):
                raise ValueError(f"split {name!r} counts {len(split.samples_per_class)} classes")
            for file in (f for shard in split.shards for f in (shard.tar, shard.index)):
                if not is_inside(file):
                    raise ValueError(f"{file!r} is not a plain file name")
            for sha256 in (s for shard in split.shards for s in (shard.sha256, shard.index_sha256)):
                if not _SHA256.fullmatch(sha256):  # a cache uses it as a file name
                    raise ValueError(f"{sha256!r} is no sha256")
            splits[name] = split
        return cls(
            folder=folder,
            name=raw["name"],
            classes=tuple(classes),
            splits=splits,
            bins=raw["bins"],
            left_out=tuple(LeftOut(**left) for left in raw["left_out"]),
            near_duplicates=raw["near_duplicates"],
            recipe=raw["recipe"],
            tool=raw["tool"],
            sha256=hashlib.sha256(text).hexdigest(),
            url=url,
        )


def is_inside(file: str) -> bool:
    """Return whether this is a plain file name, or one in a folder of the set: `train/000.tar`."""
    parts = file.split("/")
    return len(parts) <= 2 and not any(part in ("", ".", "..") or "\0" in part for part in parts)


def read_index(folder: Path, shard: Shard, *, check: bool = True) -> Index:
    """The index of one shard: array of `num_samples` records, read-only.

    Raises:
        ShardError: missing, of another length, or with another sha256 than the manifest says.
    """
    path = folder / shard.index
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ShardError(
            f"the index {path} cannot be read: {error.strerror}",
            f"{shard.num_samples} samples of {shard.tar} cannot be found",
            "copy the whole set again, or make it again with `wasteddp shard` or `wasteddp index`",
        ) from error
    return parse_index(text, shard, path, check=check)


def parse_index(text: bytes, shard: Shard, where: str | Path, *, check: bool = True) -> Index:
    """As `read_index`, from the bytes of the index; `where` they come from is for messages."""
    found = hashlib.sha256(text).hexdigest() if check else shard.index_sha256
    if len(text) != shard.num_samples * INDEX_DTYPE.itemsize or found != shard.index_sha256:
        raise ShardError(
            f"the index {where} has {len(text)} bytes and sha256 {found[:12]}; the manifest says "
            f"{shard.num_samples * INDEX_DTYPE.itemsize} bytes and {shard.index_sha256[:12]}",
            "samples would be read from wrong places",
            "copy the whole set again, or make it again with `wasteddp shard` or `wasteddp index`",
        )
    return np.frombuffer(text, dtype=INDEX_DTYPE)
