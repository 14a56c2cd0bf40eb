"""The cache: never over its limit, never without what is in use, and nothing left behind by a kill."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from faulty_server import until
from test_prefetch import fewest_fetches, next_uses_of

from wasteddp.data.remote.cache import AT_ONCE, Item, NotYet, ShardCache
from wasteddp.data.remote.prefetch import NEVER
from wasteddp.errors import RemoteError, ShardError, StoppedError, StorageError

ROOT = Path(__file__).parents[3]
SIZE = 1000


def content_of(letter: str) -> bytes:
    return letter.encode() * SIZE


def item_of(letter: str) -> Item:
    return Item(hashlib.sha256(content_of(letter)).hexdigest(), SIZE, f"http://a/{letter}.tar")


class Store:
    """Counts what is fetched from it."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def fetch(self, letter: str) -> Callable[[BinaryIO], str]:
        def write(file: BinaryIO) -> str:
            self.fetched.append(letter)
            file.write(content_of(letter))
            return hashlib.sha256(content_of(letter)).hexdigest()

        return write


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 3 * SIZE)


def never(sha256: str) -> float:
    return NEVER


def hold(
    cache: ShardCache, store: Store, letter: str, *, patience_s: float = 5.0, look: Callable[[], None] = lambda: None
) -> int:
    return cache.hold(item_of(letter), store.fetch(letter), distance=never, patience_s=patience_s, look=look)


def test_a_file_is_fetched_once_and_read_whole(cache: ShardCache, store: Store) -> None:
    for _ in range(3):
        descriptor = hold(cache, store, "a")
        assert os.pread(descriptor, 2 * SIZE, 0) == content_of("a")
        os.close(descriptor)
    assert store.fetched == ["a"]
    assert cache.holds(item_of("a").sha256)
    assert sorted(path.name for path in cache.folder.iterdir()) == [".lock", item_of("a").sha256]


def test_what_is_held_stays_and_the_longest_unused_makes_way(cache: ShardCache, store: Store) -> None:
    held = hold(cache, store, "a")
    for letter in "bcbde":
        os.close(hold(cache, store, letter))
        assert cache.used_bytes() <= cache.limit_bytes
    assert store.fetched == list("abcde")
    assert [letter for letter in "abcde" if cache.holds(item_of(letter).sha256)] == ["a", "d", "e"]
    assert os.pread(held, SIZE, 0) == content_of("a")
    os.close(held)


@pytest.mark.parametrize("seed", range(10))
def test_it_fetches_as_often_as_the_best_order_of_letting_go(cache: ShardCache, store: Store, seed: int) -> None:
    needs = random.Random(seed).choices("abcdefg", k=60)
    uses = next_uses_of(needs)
    letters = {item_of(letter).sha256: letter for letter in "abcdefg"}
    while taken := uses.take():
        (letter,) = taken[1]
        found = cache.try_hold(
            item_of(letter), store.fetch(letter), distance=lambda s: uses.distance(letters[s]), need=AT_ONCE
        )
        assert isinstance(found, int)
        os.close(found)
        assert cache.used_bytes() <= cache.limit_bytes
    assert len(store.fetched) == fewest_fetches(needs, 3)


def test_nothing_that_is_needed_sooner_makes_way(cache: ShardCache, store: Store) -> None:
    distances = dict(zip((item_of(letter).sha256 for letter in "abc"), (1.0, 2.0, 3.0), strict=True))
    for letter in "abc":
        os.close(hold(cache, store, letter))
    refused = cache.try_hold(item_of("d"), store.fetch("d"), distance=distances.__getitem__, need=3.0)
    assert refused == NotYet("it takes 1,000 bytes, 1,000 more than there is room for: 3,000 of 3,000 bytes are in use")
    found = cache.try_hold(item_of("d"), store.fetch("d"), distance=distances.__getitem__, need=2.0)
    assert isinstance(found, int)
    os.close(found)
    assert [letter for letter in "abcd" if cache.holds(item_of(letter).sha256)] == ["a", "b", "d"]


def test_a_cache_full_of_files_in_use_is_an_error_with_numbers(cache: ShardCache, store: Store) -> None:
    held = [hold(cache, store, letter) for letter in "abc"]
    with pytest.raises(ShardError, match=r"a/d\.tar cannot be put into the cache .* 3,000 of 3,000 bytes are in use"):
        hold(cache, store, "d", patience_s=0.1)
    for descriptor in held:
        os.close(descriptor)
    os.close(hold(cache, store, "d"))


def test_a_fetch_that_fails_leaves_nothing(cache: ShardCache, store: Store) -> None:
    def fail(file: BinaryIO) -> str:
        file.write(b"half")
        raise RemoteError("the store is gone")

    with pytest.raises(RemoteError):
        cache.try_hold(item_of("a"), fail, distance=never, need=AT_ONCE)
    assert cache.used_bytes() == 0
    os.close(hold(cache, store, "a"))


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageError, match=r"Function not implemented\n.*\n.*data.cache to a folder on"):
        ShardCache(tmp_path / "cache", 3 * SIZE)


def test_a_full_disk_is_named(cache: ShardCache) -> None:
    with pytest.raises(StorageError, match="filling the cache: No space left on device"):
        cache.try_hold(item_of("a"), lambda file: _full(), distance=never, need=AT_ONCE)
    assert cache.used_bytes() == 0


def _full() -> str:
    raise OSError(28, os.strerror(28))


def test_bytes_of_another_hash_are_kept_apart_and_fetched_again_by_the_next_process(
    cache: ShardCache, store: Store
) -> None:
    wrong = Item("0" * 64, SIZE, "http://a/a.tar")
    found = cache.try_hold(wrong, store.fetch("a"), distance=never, need=AT_ONCE)
    assert isinstance(found, int)
    assert os.pread(found, SIZE, 0) == content_of("a")
    os.close(found)
    assert cache.is_damaged(wrong.sha256)
    assert [path.name for path in cache.folder.iterdir() if path.name[0] == "0"] == ["0" * 64 + ".damaged"]
    other = ShardCache(cache.folder, cache.limit_bytes)
    assert not other.holds(wrong.sha256)


def test_a_file_that_somebody_cut_is_fetched_again(cache: ShardCache, store: Store) -> None:
    os.close(hold(cache, store, "a"))
    os.truncate(cache.folder / item_of("a").sha256, 10)
    descriptor = hold(cache, store, "a")
    assert os.pread(descriptor, SIZE, 0) == content_of("a")
    os.close(descriptor)


_FETCH_FOR_EVER = """
import sys, threading
sys.path[:0] = sys.argv[1].split(":")
from test_cache import *
cache = ShardCache(Path(sys.argv[2]), 3 * SIZE)
def fetch(file):
    file.write(b"half"); file.flush()
    print("fetching", flush=True)
    threading.Event().wait()
cache.try_hold(item_of("a"), fetch, distance=never, need=AT_ONCE)
"""


def _stopped() -> None:
    raise StoppedError("nobody waits")


def test_while_one_process_fetches_others_wait_and_take_over_when_it_is_killed(cache: ShardCache, store: Store) -> None:
    paths = [path for path in sys.path if path.startswith(str(ROOT))]  # this folder, and what its tests import
    command = [sys.executable, "-c", _FETCH_FOR_EVER, os.pathsep.join(paths), str(cache.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "fetching\n"
        assert cache.used_bytes() == SIZE, "what is being fetched counts whole"
        refused = cache.try_hold(item_of("a"), store.fetch("a"), distance=never, need=AT_ONCE)
        assert isinstance(refused, NotYet)
        assert refused.why == "another process is fetching it"
        with pytest.raises(ShardError, match=r"another process is fetching it\n.*there was no progress for 0 s"):
            hold(cache, store, "a", patience_s=0.1)
        with pytest.raises(StoppedError):
            hold(cache, store, "a", patience_s=60, look=_stopped)
        held: list[int] = []
        waiting = threading.Thread(target=lambda: held.append(hold(cache, store, "a", patience_s=60)))
        waiting.start()
        process.send_signal(signal.SIGKILL)
        waiting.join()
    assert os.pread(held[0], 2 * SIZE, 0) == content_of("a")
    os.close(held[0])
    assert cache.used_bytes() == SIZE


def test_what_a_killed_process_left_makes_way_first(cache: ShardCache, store: Store) -> None:
    for letter in "ab":
        os.close(hold(cache, store, letter))
    with (cache.folder / (item_of("z").sha256 + ".part")).open("wb") as file:
        file.truncate(SIZE)
    os.close(hold(cache, store, "c"))
    assert [letter for letter in "abc" if cache.holds(item_of(letter).sha256)] == ["a", "b", "c"]


def test_many_threads_never_exceed_the_limit_and_never_read_wrong_bytes(cache: ShardCache, store: Store) -> None:
    wrong: list[str] = []
    most = 0

    def work(seed: int) -> None:
        nonlocal most
        for letter in random.Random(seed).choices("abcdefg", k=40):
            descriptor = hold(cache, store, letter, patience_s=30)
            if os.pread(descriptor, SIZE, 0) != content_of(letter):
                wrong.append(letter)
            most = max(most, cache.used_bytes())
            os.close(descriptor)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: not any(thread.is_alive() for thread in threads))
    assert wrong == []
    assert 0 < most <= cache.limit_bytes


def test_the_next_start_removes_what_a_killed_process_left_and_nothing_that_is_being_fetched(tmp_path: Path) -> None:
    left, fetched = tmp_path / "0.part", tmp_path / "1.part"
    left.write_bytes(b"half")
    with fetched.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ShardCache(tmp_path, SIZE)
        assert not left.exists()
        assert fetched.exists()


@pytest.mark.parametrize("name", [f"{item_of('a').sha256}.part", item_of("a").sha256, ".lock"])
def test_a_planted_link_or_pipe_is_not_followed(cache: ShardCache, store: Store, tmp_path: Path, name: str) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"of somebody else")
    path = cache.folder / name
    path.unlink(missing_ok=True)
    path.symlink_to(foreign)
    with pytest.raises(StorageError, match="is a link, which is not followed"):
        hold(cache, store, "a")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match="it is a pipe or a device"):
        hold(cache, store, "a")
    path.unlink()
    os.close(hold(cache, store, "a"))
    assert foreign.read_bytes() == b"of somebody else"


def test_a_folder_that_others_can_write_into_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    ShardCache(folder, SIZE)
    assert folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o755, 0o700):
        folder.chmod(mode)
        ShardCache(folder, SIZE)
    for mode in (0o770, 0o1777):
        folder.chmod(mode)
        with pytest.raises(StorageError, match=r"can be written by other users.*(\n.*)*chmod go-w"):
            ShardCache(folder, SIZE)
    folder.chmod(0o755)
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(StorageError, match=f"belongs to user {owner}"):
        ShardCache(folder, SIZE)
