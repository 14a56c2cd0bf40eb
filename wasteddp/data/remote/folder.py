"""A folder behind a URL, read through fsspec: in ranges, again where that can help, proved by sha256.

What can change is tried again with growing waits: no connection, a connection that breaks, a body cut short, silence,
and the statuses 408, 425, 429 and 5xx. What the store says for certain is not: a file that is missing, forbidden or of
another size than the manifest says. No URL reaches a shell, and nothing that is read is unpickled.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, BinaryIO, TypeVar

from wasteddp.data.remote import filesystems
from wasteddp.data.remote.filesystems import DowngradeError, WrongSizeError, shown, status_of
from wasteddp.errors import DamagedShardError, RemoteError, StoppedError
from wasteddp.redaction import redacted

Result = TypeVar("Result")
Stopped = Callable[[], bool]  # whether whoever waits is to stop waiting

RANGE_BYTES = 8 << 20  # of one request: small enough that a broken connection costs little, large enough to be fast
_SLOWEST_BYTES_PER_S = 256_000  # below that a request counts as stalled, though a byte may come now and then
_FETCHES = 3  # of a file whose bytes do not have their hash: a cache on the way may have been at fault
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LOOK_S = 0.2  # how often a wait looks whether it is to end
_WORTH_ANOTHER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a store is waited for.

    Args:
        timeout_s: without a connection or a byte, after which an attempt has failed.
        attempts: of one read; a range that came begins a new count.
        rank: spreads the waits, so that not all processes come back in the same moment.
    """

    timeout_s: float = 30.0
    attempts: int = 5
    rank: int = 0

    def wait_s(self, url: str, byte: int, attempt: int) -> float:
        """Exponential, times 0.5 to 1.5 by a hash: the same in every run, another for each rank, file and attempt."""
        text = f"{url} {byte} {attempt} {self.rank}".encode()
        spread = int.from_bytes(hashlib.sha256(text).digest()[:4], "big") / 2**32
        return float(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (attempt - 1)) * (0.5 + spread))


def is_url(location: str) -> bool:
    return "://" in location


def never() -> bool:
    """Nobody asks to stop waiting."""
    return False


class RemoteFolder:
    """Files in a folder behind a URL; may be used by many threads.

    Args:
        url: of the folder; a query (such as a signature) is sent with each file.
        patience: with the store.
        wait: sleeps between two attempts, for tests.

    Raises:
        SettingsError: fsspec knows no such protocol, or its driver is not installed.
    """

    def __init__(self, url: str, patience: Patience, *, wait: Callable[[float], Any] | None = None) -> None:
        self.url = shown(url)
        self._patience = patience
        self._closed = threading.Event()
        self._wait = wait
        self._store = filesystems.open_store(url, patience.timeout_s)
        self._knows_ranges = False

    def read(self, name: str, *, stopped: Stopped = never) -> bytes:
        """All of a small file whose size nobody knows yet.

        Args:
            stopped: as for `copy`.

        Raises:
            DamagedShardError: there is no such file.
            RemoteError: it cannot be had. StoppedError: so it was `stopped`.
        """
        limit_s = 2 * self._patience.timeout_s
        return self._persistently(name, 0, None, stopped, lambda: self._request(name, {}, limit_s, stopped))

    def copy(self, name: str, num_bytes: int, sha256: str, file: BinaryIO, *, stopped: Stopped = never) -> str:
        """Writes a file into `file`, from its beginning.

        Args:
            stopped: is looked at while the store is waited for; once it is true, nothing is.

        Returns:
            the sha256 of what was written. It is another than `sha256` only if the file was fetched three times, with
            the right size each time.

        Raises:
            DamagedShardError: there is no such file, or it has another size.
            RemoteError: it cannot be had. StoppedError: so it was `stopped`.
        """
        found = ""
        for _ in range(_FETCHES):
            file.seek(0)
            found = self._copy(name, num_bytes, file, stopped)
            if found == sha256:
                break
        return found

    def fetch(self, name: str, file: BinaryIO, num_bytes: int | None = None) -> None:
        """Writes a file that no manifest tells of into `file`, behind what is there of it already.

        Args:
            num_bytes: what it must have, if that is known.

        Raises:
            DamagedShardError: there is no such file, or it has another size. RemoteError: it cannot be had.
        """
        num_bytes = self._size(name) if num_bytes is None else num_bytes
        if num_bytes is None:  # there is none, or the store does not say
            data = self.read(name)
            file.seek(0)
            file.write(data)
            file.truncate()
        else:
            self._copy(name, num_bytes, file, never, at=file.tell())

    def names(self) -> list[str]:
        """What the folder holds, sorted. A web server may list nothing.

        Raises:
            DamagedShardError: there is no such folder. RemoteError: it cannot be listed.
        """
        limit_s, look = 2 * self._patience.timeout_s, partial(self.look, f"{self.url} cannot be listed", never)
        return self._persistently("", 0, None, never, lambda: self._store.names(limit_s=limit_s, look=look))

    def look(self, where: str, stopped: Stopped) -> None:
        """While somebody waits for a file; `where` is for the message.

        Raises:
            StoppedError: it was `stopped`. RemoteError: the folder was closed.
        """
        if stopped():
            raise StoppedError(f"{where}: the run was asked to stop, and the store had not answered")
        if self._closed.is_set():
            raise RemoteError(f"{where}: the set was closed meanwhile")

    def close(self) -> None:
        """Ends what is under way: it raises `RemoteError`."""
        self._closed.set()

    def _copy(self, name: str, num_bytes: int, file: BinaryIO, stopped: Stopped, at: int = 0) -> str:
        """Its bytes from `at` on, once; returns their sha256."""
        digest = hashlib.sha256()
        while at < num_bytes:
            data = self._range(name, at, num_bytes, stopped)
            file.write(data)
            digest.update(data)
            at += len(data)
        return digest.hexdigest()

    def _range(self, name: str, begin: int, num_bytes: int, stopped: Stopped) -> bytes:
        """At least one byte of a file of `num_bytes`, from `begin` on: up to a range, or all if all was sent."""
        end = min(begin + RANGE_BYTES, num_bytes)

        def once() -> bytes:
            expected = end - begin if self._knows_ranges else num_bytes
            limit_s = self._patience.timeout_s + expected / _SLOWEST_BYTES_PER_S
            limits = {"start": begin, "end": end} | ({"size": num_bytes} if self._store.takes_size else {})
            data = self._request(name, limits, limit_s, stopped)
            size = len(data) if len(data) > end - begin else None
            if len(data) < end - begin:
                size = self._size(name)
            if size is not None and size != num_bytes:
                raise WrongSizeError(size, num_bytes)
            if len(data) < end - begin:
                raise ConnectionError(f"the body ended after {len(data):,} of {end - begin:,} bytes")
            self._knows_ranges |= len(data) < num_bytes
            return data if size is None else data[begin:]

        return self._persistently(name, begin, num_bytes, stopped, once)

    def _persistently(
        self, name: str, byte: int, num_bytes: int | None, stopped: Stopped, once: Callable[[], Result]
    ) -> Result:
        place = f"{self.url}/{name}".rstrip("/")
        where = f"{place} cannot be read" + (f" at byte {byte:,} of {num_bytes:,}" if num_bytes else "")
        attempt = 0
        while True:
            attempt += 1
            try:
                self.look(where, stopped)
                return once()
            except Exception as error:  # each driver has a tree of its own
                self.look(where, stopped)  # the attempt may have failed because of that
                where_and_why = f"{where} (attempt {attempt} of {self._patience.attempts}): {_why(error)}"
                _stop_if_certain(error, where_and_why)
                if attempt >= self._patience.attempts:
                    raise RemoteError(
                        where_and_why,
                        "its samples would be missing from the epoch",
                        "look after the network and the store, then start again: a training goes on from the newest "
                        "checkpoint; if the store is slow, raise data.read_timeout_s or data.read_attempts",
                    ) from error
                self._pause(self._patience.wait_s(place, byte, attempt), stopped)

    def _pause(self, seconds: float, stopped: Stopped) -> None:
        """Between two attempts."""
        if self._wait:
            self._wait(seconds)
            return
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not stopped() and not self._closed.wait(min(left, _LOOK_S)):
            pass

    def _request(self, name: str, limits: dict[str, int], limit_s: float, stopped: Stopped) -> bytes:
        """One request, ended after `limit_s`."""
        look = partial(self.look, f"{self.url}/{name} cannot be read", stopped)
        return bytes(self._store.ask("cat_file", name, limit_s=limit_s, look=look, **limits))

    def _size(self, name: str) -> int | None:
        """The file's size as the store tells it, asked only when bytes are missing."""
        look = partial(self.look, self.url, never)
        try:
            size = self._store.ask("info", name, limit_s=self._patience.timeout_s, look=look).get("size")
        except Exception:  # whatever it is, the read itself will say it
            return None
        return None if size is None else int(size)


def _why(error: BaseException) -> str:
    status = status_of(error)
    known = status in HTTPStatus._value2member_map_
    text = redacted(str(error).splitlines()[0]) if str(error) else ""  # a redirect's address may be a signed one
    if isinstance(error, (WrongSizeError, DowngradeError)):
        return text
    if known and status is not None:
        return f"{status} {HTTPStatus(status).phrase}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _stop_if_certain(error: Exception, found: str) -> None:
    """Raises where another attempt could not help."""
    status = status_of(error)
    cut = status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
    if isinstance(error, WrongSizeError) or cut or status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise DamagedShardError(
            found + (": it ends before that byte" if cut else ""),
            "its samples would be missing from every epoch",
            "copy the whole set there again, the manifest last",
        ) from error
    if isinstance(error, DowngradeError):
        raise RemoteError(
            found, "anybody on the way could read and change what is sent", "give an address that stays https"
        ) from error
    if status is not None and 400 <= status < 500 and status not in _WORTH_ANOTHER:
        raise RemoteError(
            found,
            "the store will not change its answer",
            "give this machine the right to read there (credentials in the environment, as the store's own tools take "
            "them), or fix data.shards",
        ) from error
