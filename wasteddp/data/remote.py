"""A folder behind a URL, read through fsspec: in ranges, again where that can help, proved by sha256.

What can change is tried again with growing waits: no connection, a connection that breaks, a body cut short, silence,
and the statuses 408, 425, 429 and 5xx. What the store says for certain is not: a file that is missing, forbidden or of
another size than the manifest says. No URL reaches a shell, and nothing that is read is unpickled.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import fsspec

from wasteddp.errors import DamagedShardError, RemoteError, SettingsError

Result = TypeVar("Result")

RANGE_BYTES = 8 << 20  # of one request: small enough that a broken connection costs little, large enough to be fast
_SLOWEST_BYTES_PER_S = 256_000  # below that a request counts as stalled, though a byte may come now and then
_FETCHES = 3  # of a file whose bytes do not have their hash: a cache on the way may have been at fault
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_WORTH_ANOTHER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
_EXTRA = "pip install 'wasteddp[remote]' (fsspec's drivers for http, s3, gs and hf)"


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


def shown(url: str) -> str:
    """The URL without user, password and query, which may hold keys: for messages, logs and files."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")).rstrip("/")


class RemoteFolder:
    """Files in a folder behind a URL; may be used by many threads.

    Args:
        url: of the folder; a query (such as a signature) is sent with each file.
        patience: with the store.
        wait: sleeps between two attempts; until the folder is closed, if left out.

    Raises:
        SettingsError: fsspec knows no such protocol, or its driver is not installed.
    """

    def __init__(self, url: str, patience: Patience, *, wait: Callable[[float], Any] | None = None) -> None:
        self.url = shown(url)
        self._patience = patience
        self._closed = threading.Event()
        self._wait = wait or self._closed.wait
        self._parts = urlsplit(url)
        self._driver, self._root = _driver(url, patience.timeout_s)
        self._knows_ranges = False
        self._running: set[Future[bytes]] = set()

    def read(self, name: str) -> bytes:
        """All of a small file whose size nobody knows yet.

        Raises:
            DamagedShardError: there is no such file.
            RemoteError: it cannot be had.
        """
        return self._persistently(name, 0, None, lambda: self._request(name, {}, 2 * self._patience.timeout_s))

    def copy(self, name: str, num_bytes: int, sha256: str, file: BinaryIO) -> str:
        """Writes a file into `file`, from its beginning.

        Returns:
            the sha256 of what was written. It is another than `sha256` only if the file was fetched three times, with
            the right size each time.

        Raises:
            DamagedShardError: there is no such file, or it has another size.
            RemoteError: it cannot be had.
        """
        found = ""
        for _ in range(_FETCHES):
            file.seek(0)
            digest, at = hashlib.sha256(), 0
            while at < num_bytes:
                data = self._range(name, at, num_bytes)
                file.write(data)
                digest.update(data)
                at += len(data)
            found = digest.hexdigest()
            if found == sha256:
                break
        return found

    def close(self) -> None:
        """Ends what is under way: it raises `RemoteError`."""
        self._closed.set()
        for future in list(self._running):
            future.cancel()

    def _range(self, name: str, begin: int, num_bytes: int) -> bytes:
        """At least one byte of a file of `num_bytes`, from `begin` on: up to a range, or all if all was sent."""
        end = min(begin + RANGE_BYTES, num_bytes)

        def once() -> bytes:
            expected = end - begin if self._knows_ranges else num_bytes
            limit_s = self._patience.timeout_s + expected / _SLOWEST_BYTES_PER_S
            data = self._request(name, {"start": begin, "end": end}, limit_s)
            size = len(data) if len(data) > end - begin else None
            if len(data) < end - begin:
                size = self._size(name)
            if size not in (None, num_bytes):
                raise _WrongSizeError(f"it has {size:,} bytes; the manifest says {num_bytes:,}")
            if len(data) < end - begin:
                raise ConnectionError(f"the body ended after {len(data):,} of {end - begin:,} bytes")
            self._knows_ranges |= len(data) < num_bytes
            return data if size is None else data[begin:]

        return self._persistently(name, begin, num_bytes, once)

    def _persistently(self, name: str, byte: int, num_bytes: int | None, once: Callable[[], Result]) -> Result:
        place = f"{self.url}/{name}"
        where = f"{place} cannot be read" + (f" at byte {byte:,} of {num_bytes:,}" if num_bytes else "")
        for attempt in range(1, self._patience.attempts + 1):
            if self._closed.is_set():
                break
            try:
                return once()
            except Exception as error:  # each driver has a tree of its own
                if self._closed.is_set():
                    break
                where_and_why = f"{where} (attempt {attempt} of {self._patience.attempts}): {_why(error)}"
                _stop_if_certain(error, where_and_why)
                if attempt == self._patience.attempts:
                    raise RemoteError(
                        where_and_why,
                        "its samples would be missing from the epoch",
                        "look after the network and the store, then start again: it goes on from the newest "
                        "checkpoint; if the store is slow, raise data.read_timeout_s or data.read_attempts",
                    ) from error
                self._wait(self._patience.wait_s(place, byte, attempt))
        raise RemoteError(f"{where}: the set was closed meanwhile")

    def _request(self, name: str, limits: dict[str, int], limit_s: float) -> bytes:
        """One request, ended after `limit_s`; drivers that are not asynchronous have only limits of their own."""
        path = self._path(name)
        if not self._driver.async_impl:
            return bytes(self._driver.cat_file(path, **limits))
        answer = self._driver._cat_file(path, **limits)
        future: Future[bytes] = asyncio.run_coroutine_threadsafe(answer, self._driver.loop)
        self._running.add(future)
        if self._closed.is_set():
            future.cancel()
        try:
            return future.result(timeout=limit_s)
        except TimeoutError as error:
            future.cancel()
            raise TimeoutError(str(error) or f"no whole answer within {limit_s:.0f} s") from error
        finally:
            self._running.discard(future)

    def _size(self, name: str) -> int | None:
        """The file's size as the store tells it, asked only when bytes are missing."""
        try:
            if not self._driver.async_impl:
                size = self._driver.info(self._path(name)).get("size")
            else:
                answer = self._driver._info(self._path(name))
                asked = asyncio.run_coroutine_threadsafe(answer, self._driver.loop)
                size = asked.result(self._patience.timeout_s).get("size")
        except Exception:  # whatever it is, the read itself will say it
            return None
        return None if size is None else int(size)

    def _path(self, name: str) -> str:
        if self._parts.scheme not in ("http", "https"):
            return f"{self._root.rstrip('/')}/{name}"
        return urlunsplit(self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{quote(name)}"))


class _WrongSizeError(Exception):
    """The store has the file, and it cannot be the one of the manifest."""


def _driver(url: str, timeout_s: float) -> tuple[Any, str]:
    """fsspec's file system for a URL, with our limits and without its own attempts, and the path in it."""
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            limits = ClientTimeout(total=None, connect=None, sock_connect=timeout_s, sock_read=timeout_s)
            options["client_kwargs"] = {"timeout": limits, "trust_env": True}  # proxies of the environment
        elif protocol in ("s3", "s3a"):
            config = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"max_attempts": 0}}
            options["config_kwargs"] = config
        driver, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    except ImportError as error:
        raise SettingsError(f"{protocol}:// needs a driver that is not installed: {error}", "", _EXTRA) from error
    except ValueError as error:
        raise SettingsError(
            f"{shown(url)} cannot be opened: {error}", "", "name a folder, or a URL of a protocol that fsspec knows"
        ) from error
    if hasattr(driver, "retries"):
        driver.retries = 1
    return driver, root


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of any driver, as far as it can be told."""
    if isinstance(error, FileNotFoundError):
        return HTTPStatus.NOT_FOUND
    if isinstance(error, PermissionError):
        return HTTPStatus.FORBIDDEN
    response = getattr(error, "response", None)  # httpx and requests: an object; botocore: a dictionary
    told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    for status in (told, getattr(response, "status_code", None), getattr(error, "status", None)):
        if isinstance(status, int):
            return status
    return _status(error.__cause__) if error.__cause__ else None


def _why(error: BaseException) -> str:
    status = _status(error)
    known = status in HTTPStatus._value2member_map_
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, _WrongSizeError):
        return text
    if known and status is not None:
        return f"{status} {HTTPStatus(status).phrase}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _stop_if_certain(error: Exception, found: str) -> None:
    """Raises where another attempt could not help."""
    status = _status(error)
    cut = status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
    if isinstance(error, _WrongSizeError) or cut or status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise DamagedShardError(
            found + (": it ends before that byte" if cut else ""),
            "its samples would be missing from every epoch",
            "copy the whole set there again, the manifest last",
        ) from error
    if status is not None and 400 <= status < 500 and status not in _WORTH_ANOTHER:
        raise RemoteError(
            found,
            "the store will not change its answer",
            "give this machine the right to read there (credentials in the environment, as the store's own tools take "
            "them), or mend data.shards",
        ) from error
