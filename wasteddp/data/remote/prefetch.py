"""Brings shards from a remote folder into the cache: when they are asked for, and ahead of the steps to come.

Threads of their own fetch what the demands say is needed next, the nearest first, as far ahead as the settings allow
and as room can be made: for it goes only what is needed later. A shard that is asked for before it is there is fetched
by the thread that asks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from wasteddp.data.manifest import INDEX_DTYPE, Shard
from wasteddp.data.remote.cache import AT_ONCE, Fetch, Item, NotYet, ShardCache
from wasteddp.data.remote.folder import Patience, RemoteFolder, Stopped, never
from wasteddp.errors import DamagedShardError, WastedError
from wasteddp.order.demand import NEVER, Demand

_LOOK_AGAIN_S = 0.2  # for room, or for a shard that another process fetches


class Fetcher:
    """The shards of one remote set, on this machine; may be used by many threads.

    Args:
        folder: the set's.
        cache: shared with the other processes of the machine.
        shards: all shards of the set that may be read.
        patience: with the store.
        threads: that fetch ahead.
        ahead_steps: that they look ahead.
    """

    def __init__(
        self,
        folder: RemoteFolder,
        cache: ShardCache,
        *,
        shards: Mapping[str, Shard],
        patience: Patience,
        threads: int,
        ahead_steps: int,
    ) -> None:
        self._folder, self._cache, self._shards = folder, cache, shards
        self._ahead_steps = ahead_steps
        # another process may be at its last attempt, with its longest waits between
        self._patience_s = 60 + 2 * patience.attempts * patience.timeout_s
        self._demands: list[Demand[Any]] = []
        self._fetching: set[str] = set()
        self._given_up: set[str] = set()  # not ahead any more; who needs it tries again, and hears why not
        self._damaged: dict[str, DamagedShardError] = {}
        self._closed = threading.Event()
        self._changed = threading.Condition()
        # Daemons: a driver without time limits of its own must not keep the process from ending.
        self._threads = [threading.Thread(target=self._work, name=f"fetch-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def hold(self, shard: Shard, stopped: Stopped = never) -> int:
        """A descriptor of the whole tar; it stays in the cache until the descriptor is closed.

        Args:
            stopped: once it is true, neither the store nor another process is waited for.

        Raises:
            DamagedShardError: the store has it not, or of another size. RemoteError: it cannot be had.
            ShardError: there is no room for it. StorageError: the disk. StoppedError: it was `stopped`.
        """
        if shard.sha256 in self._damaged:
            raise self._damaged[shard.sha256]
        try:
            descriptor = self._hold(shard.sha256, shard.num_bytes, shard.tar, stopped)
        except DamagedShardError as error:
            self._damaged[shard.sha256] = error
            raise
        self._given_up.clear()  # the store answers
        return descriptor

    def hold_index(self, shard: Shard) -> int:
        """As `hold`, for the shard's index."""
        return self._hold(shard.index_sha256, shard.num_samples * INDEX_DTYPE.itemsize, shard.index, never)

    def came_damaged(self, shard: Shard) -> bool:
        """Whether the store's own bytes are not those of the manifest."""
        return self._cache.is_damaged(shard.sha256)

    def drop(self, shard: Shard) -> None:
        """Removes a tar that is not what it was when it came."""
        self._cache.drop(shard.sha256)

    def where(self, name: str) -> str:
        return f"{self._folder.url}/{name}"

    def distance(self, sha256: str) -> float:
        """Steps until somebody on this machine needs it, as far as this process knows."""
        return min((demand.distance(sha256) for demand in list(self._demands)), default=NEVER)

    def follow(self, demand: Demand[Any]) -> None:
        """From now on its shards are fetched ahead."""
        with self._changed:
            self._demands.append(demand)
            self._changed.notify_all()

    def moved_on(self) -> None:
        """A step of a demand was taken."""
        with self._changed:
            self._changed.notify_all()

    def forget(self, demand: Demand[Any]) -> None:
        with self._changed, suppress(ValueError):
            self._demands.remove(demand)

    def close(self) -> None:
        """Ends what is under way."""
        self._closed.set()
        self._folder.close()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)

    def _hold(self, sha256: str, num_bytes: int, name: str, stopped: Stopped) -> int:
        item, fetch = self._item(sha256, num_bytes, name, stopped)
        look = partial(self._folder.look, f"{item.name} cannot be had", stopped)
        return self._cache.hold(item, fetch, distance=self.distance, patience_s=self._patience_s, look=look)

    def _item(self, sha256: str, num_bytes: int, name: str, stopped: Stopped = never) -> tuple[Item, Fetch]:
        item = Item(sha256, num_bytes, self.where(name))
        return item, partial(self._folder.copy, name, num_bytes, sha256, stopped=stopped)

    def _work(self) -> None:
        while not self._closed.is_set():
            found = self._next()
            with self._changed:
                if found is None or found[1] in self._fetching:
                    self._changed.wait(_LOOK_AGAIN_S)
                    continue
                self._fetching.add(found[1])
            steps, sha256 = found
            moved = self._fetch_ahead(self._shards[sha256], steps)
            with self._changed:
                if not moved:  # the other threads pass it over meanwhile
                    self._changed.wait(_LOOK_AGAIN_S)
                self._fetching.discard(sha256)

    def _next(self) -> tuple[float, str] | None:
        """(distance, sha256) of the shard that is needed first and that nobody here is about to have."""
        wanted = sorted(pair for demand in list(self._demands) for pair in demand.upcoming(self._ahead_steps))
        for steps, sha256 in wanted:
            if sha256 not in self._fetching and sha256 not in self._given_up and not self._cache.holds(sha256):
                return steps, sha256
        return None

    def _fetch_ahead(self, shard: Shard, steps: float) -> bool:
        """Whether that is settled; False where another process fetches it, or there is no room yet."""
        item, fetch = self._item(shard.sha256, shard.num_bytes, shard.tar)
        try:
            found = self._cache.try_hold(item, fetch, distance=self.distance, need=max(steps, AT_ONCE))
        except WastedError:
            self._given_up.add(shard.sha256)
            return True
        if isinstance(found, NotYet):
            return False
        os.close(found)
        return True
