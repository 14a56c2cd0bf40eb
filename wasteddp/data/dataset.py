"""A shard set: open it, choose a fold, and read the groups of its samples.

A set is in a local folder, or at a URL with a cache on this machine.

For cross-validation, `wasteddp shard --folds K` writes the splits fold-0 ... fold-K-1. A fold is chosen by name alone:
`train` is the shards of all other folds, one after another, and `val` those of the fold. The order of the samples is a
function of the numbers of samples of the shards, as for any other split.

Each sample may have a group: its site, camera, session or object. `groups.bin` has one line of JSON, the names of the
groups, and then one int32 for each sample, little-endian: the number of its group. Its samples are those of all tars,
by the name of the tar and in the tar's order. The manifest has its size and sha256.

Legend: N samples of a split.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wasteddp.data.manifest import FOLD_PREFIX, MANIFEST_NAME, Manifest, Shard, Split, fold_name
from wasteddp.data.reader import SplitReader
from wasteddp.data.remote.cache import ShardCache
from wasteddp.data.remote.folder import Patience, RemoteFolder, Stopped, is_url, never
from wasteddp.data.remote.prefetch import Fetcher
from wasteddp.data.tars import RemoteTars
from wasteddp.errors import DamagedShardError, SettingsError, ShardError, StoppedError, WastedError, storage
from wasteddp.files import read_regular, write_atomically

if TYPE_CHECKING:
    from wasteddp.settings import Data  # takes 0.4 s, and sharding does not need it

I32 = npt.NDArray[np.int32]

Needs = Mapping[str, int]  # sha256 of shards and their sizes, bytes
NO_FOLD = -1
GROUPS_NAME = "groups.bin"


class ShardSet:
    """The manifest of a set in a folder, and readers of its splits. Created by `open_dataset`."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def reader(self, split: str, stopped: Stopped = never) -> SplitReader:
        """Open a split for reading.

        Args:
            split: its name.
            stopped: once it returns true, reads do not wait for a store but raise StoppedError. It does not affect
                reads from a folder.
        """
        return SplitReader(self.manifest, split)

    def groups(self) -> Groups | None:
        """Return the groups of the samples; None if the set has none.

        Raises:
            ShardError: their file is damaged.
        """
        return read_groups(self.manifest)

    def require_room(self, *windows: Iterable[Needs]) -> None:
        """Check that the cache has room for the shards that are read at the same time.

        Args:
            windows: for each reader in use at the same time, the shards that it needs at some moments.

        Raises:
            SettingsError: the cache or its disk is too small.
        """

    def end_fetching(self) -> None:
        """Stop fetching: a thread that waits for a shard, now or later, receives an error."""


class RemoteShardSet(ShardSet):
    """A `ShardSet` at a URL."""

    def __init__(self, manifest: Manifest, fetcher: Fetcher, cache: ShardCache, folder: RemoteFolder) -> None:
        super().__init__(manifest)
        self._fetcher, self._cache, self._folder = fetcher, cache, folder

    def reader(self, split: str, stopped: Stopped = never) -> SplitReader:
        tars = RemoteTars(self.manifest.split(split).shards, self._fetcher, stopped)
        return SplitReader(self.manifest, split, tars)

    def groups(self) -> Groups | None:
        return read_groups(self.manifest, self._folder.read)

    def require_room(self, *windows: Iterable[Needs]) -> None:
        largest = [max(moments, key=lambda needs: sum(needs.values()), default={}) for moments in windows]
        num_bytes, num_shards = sum(sum(needs.values()) for needs in largest), sum(map(len, largest))
        total = sum(shard.num_bytes for split in self.manifest.splits.values() for shard in split.shards)
        if num_bytes > self._cache.limit_bytes:
            raise SettingsError(
                f"the steps that are read at the same time need {num_shards} shards, {num_bytes:,} bytes; "
                f"data.cache_gb allows {self._cache.limit_bytes:,}",
                "every step would fetch shards again",
                f"set data.cache_gb to {_gb(num_bytes)} or more ({_gb(total)} holds the whole set), or read fewer "
                "shards at the same time: set data.block to the size of a shard, and data.lanes to a small number",
            )
        with storage("reading the free space of the cache's disk", self._cache.folder):
            free = shutil.disk_usage(self._cache.folder).free + self._cache.used_bytes()
        if num_bytes > free:
            raise SettingsError(
                f"the steps that are read at the same time need {num_bytes:,} bytes in {self._cache.folder}; its disk "
                f"has {free:,} free",
                "the disk would be full before the first step",
                "free some space, or name a folder on another disk with data.cache",
            )

    def end_fetching(self) -> None:
        self._fetcher.close()


@contextmanager
def open_dataset(data: Data, *, rank: int = 0, stopped: Stopped = never) -> Iterator[ShardSet]:
    """Open the set at `data.staged` if that is set, else at `data.shards`.

    Args:
        data: settings of the set and its cache.
        rank: varies the waits after an error, so that the ranks do not all return to a store at the same time.
        stopped: once it returns true, reading the manifest from a store raises StoppedError.

    Raises:
        ShardError: there is no set, or it cannot be reached.
        SettingsError: the URL or the cache's folder is wrong, or `data.staged` is a copy of another set.
        StoppedError: see `stopped`.
    """
    if data.staged:
        yield ShardSet(choose_fold(_staged(data, stopped), data.fold))
        return
    if not is_url(data.shards):
        yield ShardSet(choose_fold(Manifest.load(data.shards), data.fold))
        return
    patience = Patience(data.read_timeout_s, data.read_attempts, rank)
    with ExitStack() as stack:
        folder = RemoteFolder(data.shards, patience)
        stack.callback(folder.close)
        cache = ShardCache(cache_folder(data.cache), int(data.cache_gb * 1e9))
        manifest = choose_fold(_manifest(folder, cache.folder, stopped), data.fold)
        fetcher = Fetcher(
            folder,
            cache,
            shards={shard.sha256: shard for split in manifest.splits.values() for shard in split.shards},
            patience=patience,
            threads=data.fetchers,
            ahead_steps=data.ahead_steps,
        )
        stack.callback(fetcher.close)
        yield RemoteShardSet(manifest, fetcher, cache, folder)


def cache_folder(setting: str) -> Path:
    """Return the folder for fetched shards on this machine.

    Raises:
        SettingsError: a $VARIABLE is not set on this machine.
    """
    default = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/wasteddp"
    resolved = os.path.expandvars(setting or default)
    if "$" in resolved:
        raise SettingsError(
            f"data.cache is {setting!r}, which is {resolved!r} on this machine",
            "the shards would be stored in a folder of that name",
            "set the variable on every machine, or write the full path of the folder",
        )
    return Path(resolved).expanduser()


def num_folds(manifest: Manifest) -> int:
    """Return the number of folds of a set; 0 if it has none."""
    return sum(name.startswith(FOLD_PREFIX) for name in manifest.splits)


def choose_fold(manifest: Manifest, fold: int) -> Manifest:
    """Return the manifest with the splits `train` and `val` of a fold; `NO_FOLD`: unchanged.

    Raises:
        SettingsError: the set has no such fold.
    """
    total = num_folds(manifest)
    if fold == NO_FOLD:
        return manifest
    if fold >= total:
        raise SettingsError(
            f"data.fold is {fold}, and {manifest.where} has {f'the folds 0 to {total - 1}' if total else 'no folds'}",
            "it is not known which images to train on",
            f"set data.fold to one of them, from 0 to {total - 1}"
            if total
            else "set data.fold to -1, or make a set with folds: wasteddp shard SOURCE --out FOLDER --folds 5",
        )
    folds = [manifest.splits[fold_name(number)] for number in range(total)]
    splits = {
        "train": _joined("train", [split for number, split in enumerate(folds) if number != fold]),
        "val": _joined("val", [folds[fold]]),
        **{name: split for name, split in manifest.splits.items() if not name.startswith(FOLD_PREFIX)},
    }
    return replace(manifest, splits=splits)


@dataclass(frozen=True, slots=True)
class Groups:
    """The group of every sample of a set, by tar."""

    rule: str  # how they were found, such as "column site"
    names: tuple[str, ...]
    numbers_of_tar: Mapping[str, I32]  # the group of each sample: its place in `names`

    def of_split(self, manifest: Manifest, split: str) -> I32:
        """Return the group of each sample of a split: int32 [N], places in `names`."""
        parts = [self.numbers_of_tar[shard.tar] for shard in manifest.split(split).shards]
        return np.concatenate(parts)


def save_groups(manifest: Manifest, groups: Groups) -> Mapping[str, Any]:
    """Write `groups.bin` and return what the manifest records of it."""
    body = b"".join(groups.numbers_of_tar[shard.tar].astype("<i4").tobytes() for shard in _shards(manifest))
    content = json.dumps(groups.names).encode() + b"\n" + body
    write_atomically(manifest.folder / GROUPS_NAME, content)
    return {
        "rule": groups.rule,
        "num_groups": len(groups.names),
        "file": GROUPS_NAME,
        "num_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def read_groups(manifest: Manifest, read: Callable[[str], bytes] | None = None) -> Groups | None:
    """Return the groups of a set; None if it has none.

    Args:
        read: returns the bytes of a file of the set; by default from its folder.

    Raises:
        ShardError: the file is damaged. StorageError: it cannot be read.
    """
    if not manifest.groups:
        return None
    record = manifest.groups
    if read is None:
        path = manifest.folder / record["file"]
        with storage("reading the groups of a set", path):
            content = read_regular(path)
    else:
        content = read(record["file"])
    head, _, body = content.partition(b"\n")
    num_samples = sum(shard.num_samples for shard in _shards(manifest))
    if hashlib.sha256(content).hexdigest() != record["sha256"] or len(body) != 4 * num_samples:
        raise ShardError(
            f"{manifest.where}/{record['file']} has {len(content):,} bytes and another sha256 than in the manifest "
            f"({record['num_bytes']:,} bytes)",
            "images would be counted for the wrong group",
            "copy the file again from a good copy, or make the set again with `wasteddp shard --overwrite`",
        )
    numbers = np.frombuffer(body, "<i4")
    shards = _shards(manifest)
    ends = np.cumsum([shard.num_samples for shard in shards]).tolist()
    of_tar = {
        shard.tar: numbers[end - shard.num_samples : end].astype(np.int32)
        for shard, end in zip(shards, ends, strict=True)
    }
    try:
        names = json.loads(head)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("they are not a list of texts")
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(names):
            raise ValueError(f"a sample is of group {numbers.max():,} of {len(names):,}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ShardError(
            f"the names of the groups in {manifest.where}/{record['file']} cannot be read: {error}",
            "the report could not name them",
            "make the set again with `wasteddp shard --overwrite`",
        ) from error
    return Groups(record["rule"], tuple(names), of_tar)


def _staged(data: Data, stopped: Stopped) -> Manifest:
    """Return the manifest of the copy. It must be that of `data.shards` where that can be read.

    Raises:
        SettingsError: there is no copy, or it is one of another set.
    """
    if not Path(data.staged).is_dir():
        raise SettingsError(
            f"data.staged is {data.staged}, and there is no such folder on this machine",
            f"there is no copy of {data.shards} to read",
            "leave data.staged empty, with --set data.staged= to read data.shards itself",
        )
    manifest = Manifest.load(data.staged)
    original = _sha256_of_original(data, stopped)
    if original and original != manifest.sha256:
        raise SettingsError(
            f"data.staged, {data.staged}, is not a copy of data.shards, {data.shards}: the sha256 of its "
            f"{MANIFEST_NAME} is {manifest.sha256[:12]} and not {original[:12]}",
            "the images of another set would be read",
            "leave data.staged empty (--set data.staged=), or copy data.shards there again",
        )
    return manifest


def _sha256_of_original(data: Data, stopped: Stopped) -> str:
    """Return the sha256 of the manifest at `data.shards`; '' if it cannot be read, which a copy is there for."""
    try:
        if is_url(data.shards):
            with closing(RemoteFolder(data.shards, Patience(data.read_timeout_s, attempts=1))) as folder:
                content = folder.read(MANIFEST_NAME, stopped=stopped)
        else:
            content = read_regular(Path(data.shards) / MANIFEST_NAME)
    except StoppedError:
        raise
    except (OSError, WastedError):
        return ""
    return hashlib.sha256(content).hexdigest()


def _manifest(folder: RemoteFolder, cache: Path, stopped: Stopped) -> Manifest:
    try:
        return Manifest.parse(folder.read(MANIFEST_NAME, stopped=stopped), cache, url=folder.url)
    except DamagedShardError as error:
        raise ShardError(
            error.found,
            "without a manifest the number of samples is unknown, so no epoch could be checked for completeness",
            "check data.shards; if other tools created the tars, run `wasteddp index URL --out FOLDER` and copy the "
            "files that it writes next to the tars, the manifest last",
        ) from error


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9 + 0.0005:.3f}"  # rounded up


def _joined(name: str, splits: Sequence[Split]) -> Split:
    counts = zip(*(split.samples_per_class for split in splits), strict=True)
    return Split(name, tuple(shard for split in splits for shard in split.shards), tuple(map(sum, counts)))


def _shards(manifest: Manifest) -> list[Shard]:
    """Return the shards of all splits by name, so that the order does not depend on the splits."""
    shards = {shard.tar: shard for split in manifest.splits.values() for shard in split.shards}
    return [shards[tar] for tar in sorted(shards)]
