"""Fetches shards of a remote folder into the cache: those that a reader needs now, and those of the coming steps.

Threads fetch the shard that the plan needs next and that the cache does not have, up to `ahead_steps` steps ahead. The
cache makes room only by removing shards that are needed later. If a reader needs a shard that is not there yet, its own
thread fetches it.

Evicting the shard whose next use is most distant fetches as few shards as possible.
Source: Belady 1966, "A study of replacement algorithms for a virtual-storage computer".
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

from wasteddp.data.manifest import INDEX_DTYPE, Shard
from wasteddp.data.remote.cache import AT_ONCE, Fetch, Item, NotYet, ShardCache
from wasteddp.data.remote.folder import Patience, RemoteFolder, Stopped, never
from wasteddp.errors import DamagedShardError, WastedError

Step = TypeVar("Step")

# How many steps are read ahead at most, to find which shard is needed latest. A shard that is needed later than that
# counts as not needed. A step that was read takes about 40 bytes a sample.
LOOKAHEAD_STEPS = 4096
NEVER = float("inf")
_STEPS_AT_ONCE = 32  # read while the lock is held, so that other threads do not wait long for it
_RETRY_S = 0.2  # until the next look for room, or for a shard that another process fetches


class NextUses(Generic[Step]):
    """When each shard of a plan is used next: the coming steps, taken one by one. Safe for use by many threads.

    It opens no files and has no clock. A shard is identified by its sha256.

    A distance is the number of steps until a shard is needed. 0 is the step that is taken next; a negative distance
    means a step that was taken and may still be in use.

    Args:
        steps: each with the shards that it needs.
        others: for each step, the shards that other readers on this machine need then; may end early.
        in_flight: steps that were taken last and may still be in use.
        lookahead: steps that are read ahead, at most.
    """

    def __init__(
        self,
        steps: Iterable[tuple[Step, frozenset[str]]],
        others: Iterable[frozenset[str]] = (),
        *,
        in_flight: int = 0,
        lookahead: int = LOOKAHEAD_STEPS,
    ) -> None:
        self._steps, self._others = iter(steps), iter(others)
        self._in_flight, self._lookahead = in_flight, lookahead
        self._known: deque[tuple[Step, frozenset[str]]] = deque()
        self._position = 0  # steps taken
        self._own_uses, self._other_uses = _Ranges(), _Ranges()
        self._ended = False
        self._lock = threading.Lock()

    def take(self) -> tuple[Step, frozenset[str]] | None:
        """Take the next step: return it and the shards it needs, or None after the last step."""
        with self._lock:
            self._know(1)
            if not self._known:
                return None
            self._position += 1
            return self._known.popleft()

    def upcoming(self, steps: int) -> list[tuple[float, str]]:
        """Return (distance, shard) for the shards that the steps in flight and the next `steps` need, nearest first."""
        for known in range(_STEPS_AT_ONCE, steps + _STEPS_AT_ONCE, _STEPS_AT_ONCE):
            with self._lock:
                self._know(min(known, steps))
        with self._lock:
            uses = self._own_uses.all_from(self._position - self._in_flight)
            return sorted((at - self._position, shard) for shard, at in uses if at < self._position + steps)

    def distance(self, shard: str) -> float:
        """Return the steps until a reader on this machine needs the shard; `NEVER` if none is known to."""
        known = 0
        while True:
            with self._lock:
                begin = self._position - self._in_flight
                at = min(self._own_uses.next(shard, begin), self._other_uses.next(shard, begin))
                if at < NEVER:
                    return at - self._position
                if self._ended or known >= self._lookahead:
                    return NEVER
                known = min(len(self._known) + _STEPS_AT_ONCE, self._lookahead)
                self._know(known)

    def _know(self, steps: int) -> None:
        while len(self._known) < steps and not self._ended:
            step = next(self._steps, None)
            if step is None:
                self._ended = True
                return
            number = self._position + len(self._known)
            self._known.append(step)
            self._own_uses.add(number, step[1])
            self._other_uses.add(number, next(self._others, frozenset()))


class _Ranges:
    """For each shard, the ranges of steps that need it: [first, last]."""

    def __init__(self) -> None:
        self._runs: dict[str, deque[list[int]]] = {}

    def add(self, step: int, shards: Iterable[str]) -> None:
        for shard in shards:
            runs = self._runs.setdefault(shard, deque())
            if runs and runs[-1][1] == step - 1:
                runs[-1][1] = step
            else:
                runs.append([step, step])

    def next(self, shard: str, begin: int) -> float:
        """Return the first step from `begin` on that needs the shard; `NEVER` if none is known."""
        runs = self._runs.get(shard)
        while runs and runs[0][1] < begin:
            runs.popleft()
        return max(runs[0][0], begin) if runs else NEVER

    def all_from(self, begin: int) -> Iterator[tuple[str, float]]:
        """Yield (shard, first step from `begin` on that needs it) for each shard that is needed again."""
        for shard in list(self._runs):
            at = self.next(shard, begin)
            if at < NEVER:
                yield shard, at
            else:
                del self._runs[shard]


class Fetcher:
    """The shards of one remote set on this machine. Safe for use by many threads.

    Args:
        folder: of the set.
        cache: shared with the other processes of the machine.
        shards: all shards of the set that may be read, by sha256.
        patience: with the store.
        threads: number of threads that fetch ahead.
        ahead_steps: number of steps that they look ahead.
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
        # another process may be at its last attempt, after its longest waits
        self._patience_s = 60 + 2 * patience.attempts * patience.timeout_s
        self._plans: list[NextUses[Any]] = []
        self._fetching: set[str] = set()
        self._failed: set[str] = (
            set()
        )  # not fetched ahead again; a reader that needs one tries again, and gets the error
        self._damaged: dict[str, DamagedShardError] = {}
        self._closed = threading.Event()
        self._changed = threading.Condition()
        # Daemon threads: a driver without time limits must not keep the process from ending.
        self._threads = [threading.Thread(target=self._work, name=f"fetch-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def hold(self, shard: Shard, stopped: Stopped = never) -> int:
        """Return a descriptor of the whole tar, which stays in the cache until the descriptor is closed.

        Args:
            stopped: once it returns true, this does not wait for the store or for another process.

        Raises:
            DamagedShardError: the store does not have the tar, or it has another size there.
            RemoteError: the store cannot be read.
            ShardError: the cache has no room for it.
            StorageError: the disk fails.
            StoppedError: see `stopped`.
        """
        if shard.sha256 in self._damaged:
            raise self._damaged[shard.sha256]
        try:
            descriptor = self._hold(shard.sha256, shard.num_bytes, shard.tar, stopped)
        except DamagedShardError as error:
            self._damaged[shard.sha256] = error
            raise
        self._failed.clear()  # the store answers
        return descriptor

    def hold_index(self, shard: Shard) -> int:
        """Do as `hold`, for the shard's index."""
        return self._hold(shard.index_sha256, shard.num_samples * INDEX_DTYPE.itemsize, shard.index, never)

    def came_damaged(self, shard: Shard) -> bool:
        """Return whether the bytes in the store are not those of the manifest."""
        return self._cache.is_damaged(shard.sha256)

    def drop(self, shard: Shard) -> None:
        """Remove a tar whose bytes have changed since it was fetched."""
        self._cache.drop(shard.sha256)

    def where(self, name: str) -> str:
        return f"{self._folder.url}/{name}"

    def distance(self, sha256: str) -> float:
        """Return the steps until a reader on this machine needs the shard, as far as this process knows."""
        return min((plan.distance(sha256) for plan in list(self._plans)), default=NEVER)

    def follow(self, plan: NextUses[Any]) -> None:
        """Fetch the shards of a plan ahead from now on."""
        with self._changed:
            self._plans.append(plan)
            self._changed.notify_all()

    def notify(self) -> None:
        """Inform the threads that a step of a plan was taken."""
        with self._changed:
            self._changed.notify_all()

    def unfollow(self, plan: NextUses[Any]) -> None:
        with self._changed, suppress(ValueError):
            self._plans.remove(plan)

    def close(self) -> None:
        """Stop all fetches."""
        self._closed.set()
        self._folder.close()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)

    def _hold(self, sha256: str, num_bytes: int, name: str, stopped: Stopped) -> int:
        item, fetch = self._item(sha256, num_bytes, name, stopped)
        look = partial(self._folder.look, f"{item.name} cannot be fetched", stopped)
        return self._cache.hold(item, fetch, distance=self.distance, patience_s=self._patience_s, look=look)

    def _item(self, sha256: str, num_bytes: int, name: str, stopped: Stopped = never) -> tuple[Item, Fetch]:
        item = Item(sha256, num_bytes, self.where(name))
        return item, partial(self._folder.copy, name, num_bytes, sha256, stopped=stopped)

    def _work(self) -> None:
        while not self._closed.is_set():
            found = self._next()
            with self._changed:
                if found is None or found[1] in self._fetching:
                    self._changed.wait(_RETRY_S)
                    continue
                self._fetching.add(found[1])
            steps, sha256 = found
            is_done = self._fetch_ahead(self._shards[sha256], steps)
            with self._changed:
                if not is_done:  # meanwhile the other threads skip this shard
                    self._changed.wait(_RETRY_S)
                self._fetching.discard(sha256)

    def _next(self) -> tuple[float, str] | None:
        """Return (distance, sha256) of the next shard that is needed and that no thread of this process fetches."""
        wanted = sorted(pair for plan in list(self._plans) for pair in plan.upcoming(self._ahead_steps))
        for steps, sha256 in wanted:
            if sha256 not in self._fetching and sha256 not in self._failed and not self._cache.holds(sha256):
                return steps, sha256
        return None

    def _fetch_ahead(self, shard: Shard, steps: float) -> bool:
        """Fetch a shard. Return False if another process is fetching it, or if there is no room yet."""
        item, fetch = self._item(shard.sha256, shard.num_bytes, shard.tar)
        try:
            found = self._cache.try_hold(item, fetch, distance=self.distance, need=max(steps, AT_ONCE))
        except WastedError:
            self._failed.add(shard.sha256)
            return True
        if isinstance(found, NotYet):
            return False
        os.close(found)
        return True
