"""A shard set, open for reading, wherever it lies: in a folder, or behind a URL with a cache on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from wasteddp.data.manifest import MANIFEST_NAME, Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.data.remote.cache import ShardCache
from wasteddp.data.remote.folder import Patience, RemoteFolder, Stopped, is_url, never
from wasteddp.data.remote.prefetch import Fetcher
from wasteddp.data.remote.tars import RemoteTars
from wasteddp.errors import DamagedShardError, SettingsError, ShardError, storage
from wasteddp.settings import Data

Needs = Mapping[str, int]  # sha256 of shards and their sizes, bytes


class ShardSet:
    """The manifest and readers of its splits. Made by `opened`."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def reader(self, split: str, stopped: Stopped = never) -> SplitReader:
        """The split, open for reading.

        Args:
            stopped: once it is true, a read waits for no store: it raises StoppedError. A folder is always read.
        """
        return SplitReader(self.manifest, split)

    def require_room(self, *windows: Iterable[Needs]) -> None:
        """Refuses a set that would not be readable as it is going to be read.

        Args:
            windows: for each reader that will be in use at the same time, what it holds at once at some moments.
        """

    def end_fetching(self) -> None:
        """Whoever waits for a shard from now on hears an error."""


class RemoteShardSet(ShardSet):
    """The same for a set behind a URL."""

    def __init__(self, manifest: Manifest, fetcher: Fetcher, cache: ShardCache) -> None:
        super().__init__(manifest)
        self._fetcher, self._cache = fetcher, cache

    def reader(self, split: str, stopped: Stopped = never) -> SplitReader:
        tars = RemoteTars(self.manifest.split(split).shards, self._fetcher, stopped)
        return SplitReader(self.manifest, split, tars)

    def require_room(self, *windows: Iterable[Needs]) -> None:
        largest = [max(moments, key=lambda needs: sum(needs.values()), default={}) for moments in windows]
        num_bytes, num_shards = sum(sum(needs.values()) for needs in largest), sum(map(len, largest))
        total = sum(shard.num_bytes for split in self.manifest.splits.values() for shard in split.shards)
        if num_bytes > self._cache.limit_bytes:
            raise SettingsError(
                f"the steps that are read at once need {num_shards} shards, {num_bytes:,} bytes; data.cache_gb allows "
                f"{self._cache.limit_bytes:,}",
                "shards would be fetched again and again, for every step",
                f"set data.cache_gb to {_gb(num_bytes)} or more ({_gb(total)} holds the whole set), or let fewer "
                "shards be read at once: a data.block as long as a shard, and few data.lanes",
            )
        with storage("looking at the cache's disk", self._cache.folder):
            free = shutil.disk_usage(self._cache.folder).free + self._cache.used_bytes()
        if num_bytes > free:
            raise SettingsError(
                f"the steps that are read at once need {num_bytes:,} bytes in {self._cache.folder}; its disk has "
                f"{free:,} for them",
                "the disk would be full before the first step",
                "free some space, or name a folder on another disk with data.cache",
            )

    def end_fetching(self) -> None:
        self._fetcher.close()


@contextmanager
def open_dataset(data: Data, *, rank: int = 0, stopped: Stopped = never) -> Iterator[ShardSet]:
    """The set at `data.staged`, where that is set, or else at `data.shards`.

    Args:
        rank: spreads the waits after an error, so that not all ranks come back to a store in the same moment.
        stopped: once it is true, the manifest is not waited for: StoppedError.

    Raises:
        ShardError: there is none, or it cannot be reached. SettingsError: the URL or the cache's folder.
    """
    if data.staged or not is_url(data.shards):
        yield ShardSet(Manifest.load(data.staged or data.shards))
        return
    patience = Patience(data.read_timeout_s, data.read_attempts, rank)
    with ExitStack() as stack:
        folder = RemoteFolder(data.shards, patience)
        stack.callback(folder.close)
        cache = ShardCache(cache_folder(data.cache), int(data.cache_gb * 1e9))
        manifest = _manifest(folder, cache.folder, stopped)
        fetcher = Fetcher(
            folder,
            cache,
            shards={shard.sha256: shard for split in manifest.splits.values() for shard in split.shards},
            patience=patience,
            threads=data.fetchers,
            ahead_steps=data.ahead_steps,
        )
        stack.callback(fetcher.close)
        yield RemoteShardSet(manifest, fetcher, cache)


def cache_folder(setting: str) -> Path:
    """Where fetched shards are kept on this machine.

    Raises:
        SettingsError: a $VARIABLE that is not set here.
    """
    default = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/wasteddp"
    resolved = os.path.expandvars(setting or default)
    if "$" in resolved:
        raise SettingsError(
            f"data.cache is {setting!r}, and that is {resolved!r} on this machine",
            "the shards would be kept in a folder of that name",
            "set the variable on every machine, or write the folder out",
        )
    return Path(resolved).expanduser()


def _manifest(folder: RemoteFolder, cache: Path, stopped: Stopped) -> Manifest:
    try:
        return Manifest.parse(folder.read(MANIFEST_NAME, stopped=stopped), cache, url=folder.url)
    except DamagedShardError as error:
        raise ShardError(
            error.found,
            "without a manifest nobody knows how many samples there are, so no epoch could be proved whole",
            "check data.shards; if other tools made the tars, run `wasteddp index URL --out FOLDER` and copy what it "
            "writes beside them, the manifest last",
        ) from error


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9 + 0.0005:.3f}"  # rounded up
