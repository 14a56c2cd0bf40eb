"""A folder at a URL, read through fsspec: in ranges, with retries, and checked by sha256.

Temporary failures are retried after increasing waits: no connection, a broken connection, a truncated body, a timeout,
and the statuses 408, 425, 429 and 5xx. Permanent ones are not: a file that is missing, forbidden or of another size
than in the manifest. No URL is passed to a shell, and nothing that is read is unpickled.
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
from wasteddp.data.remote.filesystems import DowngradeError, WrongSizeError, hide_secrets, status_of
from wasteddp.errors import DamagedShardError, RemoteError, StoppedError
from wasteddp.redaction import redacted

Result = TypeVar("Result")
Stopped = Callable[[], bool]  # whether to stop waiting

RANGE_BYTES = 8 << 20  # of one request: small enough that a broken connection costs little, large enough to be fast
_SLOWEST_BYTES_PER_S = 256_000  # a slower request counts as stalled, even if single bytes arrive
_FETCHES = 3  # of a file whose bytes have another hash: a proxy's cache may have damaged it
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LOOK_S = 0.2  # how often a wait checks whether to end
_TEMPORARY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a store.

    Args:
        timeout_s: seconds without a connection or a byte after which an attempt fails.
        attempts: number of attempts to read one range.
        rank: varies the waits, so that the processes do not all return at the same time.
    """

    timeout_s: float = 30.0
    attempts: int = 5
    rank: int = 0

    def wait_s(self, url: str, byte: int, attempt: int) -> float:
        """Return an exponential wait times 0.5 to 1.5: a hash of rank, file and attempt, the same in every run."""
        text = f"{url} {byte} {attempt} {self.rank}".encode()
        spread = int.from_bytes(hashlib.sha256(text).digest()[:4], "big") / 2**32
        return float(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (attempt - 1)) * (0.5 + spread))


def is_url(location: str) -> bool:
    return "://" in location


def never() -> bool:
    """Return False: do not stop waiting."""
    return False


class RemoteFolder:
    """Files in a folder at a URL. Safe for use by many threads.

    Args:
        url: of the folder; its query (such as a signature) is sent with each request.
        patience: with the store.
        wait: sleeps between two attempts, for tests.

    Raises:
        SettingsError: fsspec does not have the protocol, or its driver is not installed.
    """

    def __init__(self, url: str, patience: Patience, *, wait: Callable[[float], Any] | None = None) -> None:
        self.url = hide_secrets(url)
        self._patience = patience
        self._closed = threading.Event()
        self._wait = wait
        self._store = filesystems.open_store(url, patience.timeout_s)
        self._knows_ranges = False

    def read(self, name: str, *, stopped: Stopped = never) -> bytes:
        """Return a small file whose size is not known.

        Args:
            name: of the file.
            stopped: see `copy`.

        Raises:
            DamagedShardError: there is no such file.
            RemoteError: it cannot be read.
            StoppedError: see `copy`.
        """
        limit_s = 2 * self._patience.timeout_s
        return self._retry(name, 0, None, stopped, lambda: self._request(name, {}, limit_s, stopped))

    def copy(self, name: str, num_bytes: int, sha256: str, file: BinaryIO, *, stopped: Stopped = never) -> str:
        """Write a file of the folder to `file`, from the beginning.

        Args:
            name: of the file.
            num_bytes: its size.
            sha256: its hash.
            file: to write to.
            stopped: once it returns true, this raises StoppedError instead of waiting for the store.

        Returns:
            the sha256 of the bytes that were written. It differs from `sha256` only after three fetches, each of the
            right size.

        Raises:
            DamagedShardError: there is no such file, or it has another size.
            RemoteError: it cannot be read.
            StoppedError: see `stopped`.
        """
        found = ""
        for _ in range(_FETCHES):
            file.seek(0)
            found = self._copy(name, num_bytes, file, stopped)
            if found == sha256:
                break
        return found

    def fetch(self, name: str, file: BinaryIO, num_bytes: int | None = None) -> None:
        """Write a file that is in no manifest to `file`, after the bytes that `file` has already.

        Args:
            name: of the file.
            file: to write to.
            num_bytes: its size, if that is known.

        Raises:
            DamagedShardError: there is no such file, or it has another size.
            RemoteError: it cannot be read.
        """
        num_bytes = self._size(name) if num_bytes is None else num_bytes
        if num_bytes is None:  # there is no such file, or the store does not report its size
            data = self.read(name)
            file.seek(0)
            file.write(data)
            file.truncate()
        else:
            self._copy(name, num_bytes, file, never, at=file.tell())

    def names(self) -> list[str]:
        """Return the names in the folder, sorted. A web server may list none.

        Raises:
            DamagedShardError: there is no such folder.
            RemoteError: it cannot be listed.
        """
        limit_s, look = 2 * self._patience.timeout_s, partial(self.look, f"{self.url} cannot be listed", never)
        return self._retry("", 0, None, never, lambda: self._store.names(limit_s=limit_s, look=look))

    def look(self, where: str, stopped: Stopped) -> None:
        """Check whether to wait on; called while something waits for a file. `where` is for the message.

        Raises:
            StoppedError: `stopped` returns true.
            RemoteError: the folder was closed.
        """
        if stopped():
            raise StoppedError(f"{where}: the run was asked to stop before the store answered")
        if self._closed.is_set():
            raise RemoteError(f"{where}: the set was closed meanwhile")

    def close(self) -> None:
        """End all reads in progress: they raise `RemoteError`."""
        self._closed.set()

    def _copy(self, name: str, num_bytes: int, file: BinaryIO, stopped: Stopped, at: int = 0) -> str:
        """Write the bytes from `at` on. Return their sha256."""
        digest = hashlib.sha256()
        while at < num_bytes:
            data = self._read_range(name, at, num_bytes, stopped)
            file.write(data)
            digest.update(data)
            at += len(data)
        return digest.hexdigest()

    def _read_range(self, name: str, begin: int, num_bytes: int, stopped: Stopped) -> bytes:
        """Return bytes from `begin` on: a range, or all of them if the server sent the whole file."""
        end = min(begin + RANGE_BYTES, num_bytes)

        def read_once() -> bytes:
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

        return self._retry(name, begin, num_bytes, stopped, read_once)

    def _retry(
        self, name: str, byte: int, num_bytes: int | None, stopped: Stopped, attempt_once: Callable[[], Result]
    ) -> Result:
        place = f"{self.url}/{name}".rstrip("/")
        where = f"{place} cannot be read" + (f" at byte {byte:,} of {num_bytes:,}" if num_bytes else "")
        attempt = 0
        while True:
            attempt += 1
            try:
                self.look(where, stopped)
                return attempt_once()
            except Exception as error:  # the drivers' errors have no common class
                self.look(where, stopped)  # this may be why the attempt failed
                where_and_why = f"{where} (attempt {attempt} of {self._patience.attempts}): {_why(error)}"
                _raise_if_permanent(error, where_and_why)
                if attempt >= self._patience.attempts:
                    raise RemoteError(
                        where_and_why,
                        "its samples would be missing from the epoch",
                        "check the network and the store, then start again: a training continues from the newest "
                        "checkpoint; if the store is slow, raise data.read_timeout_s or data.read_attempts",
                    ) from error
                self._pause(self._patience.wait_s(place, byte, attempt), stopped)

    def _pause(self, seconds: float, stopped: Stopped) -> None:
        """Sleep between two attempts."""
        if self._wait:
            self._wait(seconds)
            return
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not stopped() and not self._closed.wait(min(left, _LOOK_S)):
            pass

    def _request(self, name: str, limits: dict[str, int], limit_s: float, stopped: Stopped) -> bytes:
        """Send one request, which ends after `limit_s`."""
        look = partial(self.look, f"{self.url}/{name} cannot be read", stopped)
        return bytes(self._store.ask("cat_file", name, limit_s=limit_s, look=look, **limits))

    def _size(self, name: str) -> int | None:
        """Return the file's size as the store reports it, or None. Called only if bytes are missing."""
        look = partial(self.look, self.url, never)
        try:
            size = self._store.ask("info", name, limit_s=self._patience.timeout_s, look=look).get("size")
        except Exception:  # the read itself will report it
            return None
        return None if size is None else int(size)


def _why(error: BaseException) -> str:
    status = status_of(error)
    known = status in HTTPStatus._value2member_map_
    text = redacted(str(error).splitlines()[0]) if str(error) else ""  # the address of a redirect may be signed
    if isinstance(error, (WrongSizeError, DowngradeError)):
        return text
    if known and status is not None:
        return f"{status} {HTTPStatus(status).phrase}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _raise_if_permanent(error: Exception, found: str) -> None:
    """Raise an error if another attempt could not succeed."""
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
            found,
            "anyone on the network path could read and change the data",
            "use an address that does not redirect to http",
        ) from error
    if status is not None and 400 <= status < 500 and status not in _TEMPORARY:
        raise RemoteError(
            found,
            "the store will not change its answer",
            "give this machine permission to read there (credentials in the environment, as for the store's own "
            "tools), or fix data.shards",
        ) from error
