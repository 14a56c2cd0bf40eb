"""Which of fsspec's drivers reads a URL, and what must be said to it: our time limits, and no attempts of its own.

A driver that tries again by itself, asks a question before each read, or prints a traceback for each failure would
multiply the waits that `remote` promises. What each one does beside reading is written where it is turned off.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from types import MethodType
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import fsspec

from wasteddp.errors import SettingsError

_LOOK_S = 0.2  # how often a wait looks whether it is to end
_EXTRA = "pip install 'wasteddp[remote]' (fsspec's drivers for s3, gs and hf)"
_HUB = re.compile(
    r"hf://(?:(?P<kind>models|datasets|spaces|buckets)/)?(?P<id>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)


class WrongSizeError(Exception):
    """The store has the file, and it cannot be the one that is wanted."""

    def __init__(self, found: int, wanted: int) -> None:
        super().__init__(f"it has {found:,} bytes instead of {wanted:,}")


class DowngradeError(Exception):
    """A redirect from https to http."""

    def __init__(self) -> None:
        super().__init__("the server redirects from https to http")


@dataclass(frozen=True, slots=True)
class Store:
    """A folder behind a URL; may be used by many threads.

    Args:
        driver: fsspec's file system, which reads.
        path_of: the path that the driver knows a file of the folder by.
        options: further arguments of each read, asked for again each time: a login may be renewed meanwhile.
        listing: the file system that lists the folder, and the folder's path there.
        takes_size: whether `cat_file` takes the `size` that the whole file must have.
    """

    driver: Any
    path_of: Callable[[str], str]
    options: Callable[[], Mapping[str, Any]]
    listing: tuple[Any, str]
    takes_size: bool = False

    def ask(self, method: str, name: str, *, limit_s: float, look: Callable[[], None], **options: Any) -> Any:
        """What a method of the driver, such as `cat_file`, says of a file.

        Args:
            limit_s: after which `TimeoutError` is raised.
            look: called meanwhile; it raises where nobody waits for the answer any longer.
        """
        path, options = self.path_of(name), {**self.options(), **options}
        return _answer(self.driver, method, path, limit_s=limit_s, look=look, **options)

    def names(self, *, limit_s: float, look: Callable[[], None]) -> list[str]:
        """What the folder holds, sorted. A web server may list nothing, or only what it likes."""
        driver, folder = self.listing
        found = _answer(driver, "ls", folder, limit_s=limit_s, look=look, detail=False)
        names = {path.rstrip("/").rpartition("/")[2] for path in found}
        return sorted(unquote(name.partition("?")[0]) if "://" in folder else name for name in names)


def shown(url: str) -> str:
    """The URL without user, password and query, which may hold keys: for messages, logs and files."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")).rstrip("/")


def open_store(url: str, timeout_s: float) -> Store:
    """The store of a URL. Asks nobody but, for gs, where this machine's credentials are.

    Args:
        timeout_s: without a connection or a byte, after which a request fails.

    Raises:
        SettingsError: fsspec knows no such protocol, its driver is not installed, or the URL is none of a folder there.
    """
    protocol = url.partition("://")[0]
    try:
        if protocol in ("http", "https"):
            return _web(url, timeout_s)
        if protocol == "hf":
            return _hub(url, timeout_s)
        open_one = {"s3": _s3, "s3a": _s3, "gs": _google, "gcs": _google}.get(protocol, _other)
        driver, root = open_one(url, timeout_s)
        return Store(driver, lambda name: f"{root.rstrip('/')}/{name}", dict, (driver, root))
    except ImportError as error:
        raise SettingsError(f"{protocol}:// needs a driver that is not installed: {error}", "", _EXTRA) from error
    except SettingsError:
        raise
    except Exception as error:  # each driver has a tree of its own
        # the text of other errors may hold a login: gcsfs sends one in the address that it proves it at
        why = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise SettingsError(
            f"{shown(url)} cannot be opened: {why}",
            "",
            "name a folder, or a URL of a protocol that fsspec knows; credentials are those of the store's own tools",
        ) from error


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of any driver, as far as it can be told."""
    if isinstance(error, FileNotFoundError):
        return HTTPStatus.NOT_FOUND
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and str(error).startswith("Forbidden: ")):
        return HTTPStatus.FORBIDDEN  # gcsfs has no other word for it
    response = getattr(error, "response", None)  # httpx and requests: an object; botocore: a dictionary
    told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    said = (told, getattr(response, "status_code", None), getattr(error, "status", None), vars(error).get("code"))
    for status in said:  # aiohttp has status, and a code that warns; gcsfs has code
        if isinstance(status, int):
            return status
    return status_of(error.__cause__) if error.__cause__ else None


def _answer(driver: Any, method: str, path: str, *, limit_s: float, look: Callable[[], None], **options: Any) -> Any:
    """A driver that is not asynchronous works in a thread of its own, which is left behind where it hangs."""
    if driver.async_impl:
        coroutine = getattr(driver, f"_{method}")(path, **options)
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, driver.loop)
    else:
        future = _in_a_thread(partial(getattr(driver, method), path, **options))
    end = time.monotonic() + limit_s
    try:
        while True:
            try:
                return future.result(timeout=max(0.0, min(_LOOK_S, end - time.monotonic())))
            except TimeoutError as error:
                if future.done():  # meanwhile, or this is the driver's own word
                    return future.result()
                look()
                if time.monotonic() >= end:
                    raise TimeoutError(f"no whole answer within {limit_s:.0f} s") from error
    finally:
        future.cancel()


def _in_a_thread(function: Callable[[], Any]) -> Future[Any]:
    """The function's result, computed by a daemon: it must not keep the process from ending."""
    future: Future[Any] = Future()

    def work() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    threading.Thread(target=work, name="store", daemon=True).start()
    return future


def _opened(url: str, **options: Any) -> tuple[Any, str]:
    driver, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    return driver, str(root)


def _other(url: str, timeout_s: float) -> tuple[Any, str]:
    return _opened(url)


def _web(url: str, timeout_s: float) -> Store:
    from wasteddp.data.remote.web import Web

    driver, folder = Web(timeout_s), url.partition("?")[0].rstrip("/") + "/"
    return Store(driver, partial(_beside, url), dict, (driver, folder), takes_size=True)


def _beside(url: str, name: str) -> str:
    """The address of a file in the folder; a query (such as a signature) is sent with each."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def _s3(url: str, timeout_s: float) -> tuple[Any, str]:
    limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"max_attempts": 0}}
    driver, root = _opened(url, config_kwargs=limits)
    driver.retries = 1
    return driver, root


def _google(url: str, timeout_s: float) -> tuple[Any, str]:
    """The class that reads by JSON and HTTP. The one that gcsfs registers asks by gRPC, before each read, what kind of
    bucket it is, for up to a minute where no answer comes. Either tries six times, for 33 s, and prints a traceback;
    their number is read when the class is made, so the method behind the attempts is taken.
    """
    from gcsfs.core import GCSFileSystem

    from wasteddp.data.remote.web import silence

    limits = {"requests_timeout": silence(timeout_s), "session_kwargs": {"trust_env": True}}
    driver = GCSFileSystem(skip_instance_cache=True, **limits)
    driver._request = MethodType(driver._request.__wrapped__, driver)
    return driver, str(driver._strip_protocol(url))


def _hub(url: str, timeout_s: float) -> Store:
    """Hugging Face's own driver lists and asks before it reads, tries six times with its own waits, obeys a rate limit
    for minutes, and cannot be told to stop. Each file has a plain address at the hub; so that is read, as from any web
    server, with the login that the hub's tools have. The driver still lists.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    match = _HUB.fullmatch(url)
    if match is None or match["id"].split("/")[0] in ("models", "datasets", "spaces", "buckets"):
        raise SettingsError(
            f"{shown(url)} is no folder of the Hugging Face hub",
            "there is nothing to read",
            "write hf://datasets/OWNER/NAME/FOLDER, or hf://datasets/OWNER/NAME@REVISION/FOLDER",
        )
    if constants.HF_HUB_OFFLINE:
        raise SettingsError(
            f"{shown(url)} is on the hub, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE says to leave it alone",
            "no shard could be read",
            "unset the variable, or copy the set to a disk and name that folder",
        )
    kind = "" if match["kind"] in (None, "models") else f"{match['kind']}/"
    revision = "" if match["kind"] == "buckets" else "/" + quote(unquote(match["revision"] or "main"), safe="")
    folder = f"{constants.ENDPOINT}/{kind}{match['id']}/resolve{revision}/{quote(match['path'] or '')}"
    return replace(
        _web(folder, timeout_s),
        # behind a redirect to another host, where large files are, aiohttp leaves the login out
        options=lambda: {"headers": build_hf_headers(library_name="wasteddp")},
        listing=_opened(url),
    )
