"""The fsspec driver of a URL, with our time limits and without retries of its own.

A driver that retries, sends a request before each read, or prints a traceback for each failure would multiply the waits
that docs/remote.md promises. The code that turns such a feature off says what the feature does.
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

_LOOK_S = 0.2  # how often a wait checks whether to end
_EXTRA = "pip install 'wasteddp[remote]' (fsspec's drivers for s3, gs and hf)"
_HUB = re.compile(
    r"hf://(?:(?P<kind>models|datasets|spaces|buckets)/)?(?P<id>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)


class WrongSizeError(Exception):
    """The store has a file of that name with another size."""

    def __init__(self, found: int, wanted: int) -> None:
        super().__init__(f"it has {found:,} bytes instead of {wanted:,}")


class DowngradeError(Exception):
    """A redirect from https to http."""

    def __init__(self) -> None:
        super().__init__("the server redirects from https to http")


@dataclass(frozen=True, slots=True)
class Store:
    """A folder at a URL. Safe for use by many threads.

    Args:
        driver: the fsspec file system that reads.
        path_of: returns the driver's path of a file in the folder.
        options: returns further arguments of a read; called for each, since a login may be renewed meanwhile.
        listing: the file system that lists the folder, and the folder's path there.
        takes_size: whether `cat_file` has an argument `size`, the bytes that the whole file must have.
    """

    driver: Any
    path_of: Callable[[str], str]
    options: Callable[[], Mapping[str, Any]]
    listing: tuple[Any, str]
    takes_size: bool = False

    def ask(self, method: str, name: str, *, limit_s: float, look: Callable[[], None], **options: Any) -> Any:
        """Return the result of a method of the driver, such as `cat_file`, for a file.

        Args:
            method: its name.
            name: of the file.
            limit_s: seconds after which `TimeoutError` is raised.
            look: called meanwhile; raises if the result is not needed any more.
            options: arguments of the method.
        """
        path, options = self.path_of(name), {**self.options(), **options}
        return _call(self.driver, method, path, limit_s=limit_s, look=look, **options)

    def names(self, *, limit_s: float, look: Callable[[], None]) -> list[str]:
        """Return the names in the folder, sorted. A web server may list none or only some of them."""
        driver, folder = self.listing
        found = _call(driver, "ls", folder, limit_s=limit_s, look=look, detail=False)
        names = {path.rstrip("/").rpartition("/")[2] for path in found}
        return sorted(unquote(name.partition("?")[0]) if "://" in folder else name for name in names)


def hide_secrets(url: str) -> str:
    """Return the URL without user, password and query, which may be keys: for messages, logs and files."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")).rstrip("/")


def open_store(url: str, timeout_s: float) -> Store:
    """Return the store of a URL. This sends no request, except that gs may look for this machine's credentials.

    Args:
        url: of the folder.
        timeout_s: seconds without a connection or a byte after which a request fails.

    Raises:
        SettingsError: fsspec does not have the protocol, its driver is not installed, or the URL is not that of a
            folder.
    """
    protocol = url.partition("://")[0]
    try:
        if protocol in ("http", "https"):
            return _open_web(url, timeout_s)
        if protocol == "hf":
            return _open_hub(url, timeout_s)
        open_one = {"s3": _open_s3, "s3a": _open_s3, "gs": _open_google, "gcs": _open_google}.get(protocol, _open_other)
        driver, root = open_one(url, timeout_s)
        return Store(driver, lambda name: f"{root.rstrip('/')}/{name}", dict, (driver, root))
    except ImportError as error:
        raise SettingsError(f"{protocol}:// needs a driver that is not installed: {error}", "", _EXTRA) from error
    except SettingsError:
        raise
    except Exception as error:  # the drivers' errors have no common class
        # the text of other errors may contain a login, which gcsfs sends in a URL
        why = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise SettingsError(
            f"{hide_secrets(url)} cannot be opened: {why}",
            "",
            "name a folder, or a URL of a protocol that fsspec has; credentials are those of the store's own tools",
        ) from error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error of any driver; None if it has none."""
    if isinstance(error, FileNotFoundError):
        return HTTPStatus.NOT_FOUND
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and str(error).startswith("Forbidden: ")):
        return HTTPStatus.FORBIDDEN  # the error of gcsfs has no other sign of it
    response = getattr(error, "response", None)  # httpx and requests: an object; botocore: a dictionary
    nested = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    found = (nested, getattr(response, "status_code", None), getattr(error, "status", None), vars(error).get("code"))
    for status in found:  # aiohttp: status (its code prints a warning); gcsfs: code
        if isinstance(status, int):
            return status
    return status_of(error.__cause__) if error.__cause__ else None


def _call(driver: Any, method: str, path: str, *, limit_s: float, look: Callable[[], None], **options: Any) -> Any:
    """Call a method of a driver. One that is not asynchronous runs in a thread, which is abandoned if it hangs."""
    if driver.async_impl:
        coroutine = getattr(driver, f"_{method}")(path, **options)
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, driver.loop)
    else:
        future = _run_in_thread(partial(getattr(driver, method), path, **options))
    end = time.monotonic() + limit_s
    try:
        while True:
            try:
                return future.result(timeout=max(0.0, min(_LOOK_S, end - time.monotonic())))
            except TimeoutError as error:
                if future.done():  # it finished meanwhile, or the driver itself raised TimeoutError
                    return future.result()
                look()
                if time.monotonic() >= end:
                    raise TimeoutError(f"no complete answer within {limit_s:.0f} s") from error
    finally:
        future.cancel()


def _run_in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Return the future result of a function that a daemon thread runs, which does not keep the process from ending."""
    future: Future[Any] = Future()

    def work() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    threading.Thread(target=work, name="store", daemon=True).start()
    return future


def _open(url: str, **options: Any) -> tuple[Any, str]:
    driver, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    return driver, str(root)


def _open_other(url: str, timeout_s: float) -> tuple[Any, str]:
    return _open(url)


def _open_web(url: str, timeout_s: float) -> Store:
    from wasteddp.data.remote.web import Web

    driver, folder = Web(timeout_s), url.partition("?")[0].rstrip("/") + "/"
    return Store(driver, partial(_address, url), dict, (driver, folder), takes_size=True)


def _address(url: str, name: str) -> str:
    """Return the address of a file in the folder, with the query of the folder's URL (such as a signature)."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def _open_s3(url: str, timeout_s: float) -> tuple[Any, str]:
    limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"max_attempts": 0}}
    driver, root = _open(url, config_kwargs=limits)
    driver.retries = 1
    return driver, root


def _open_google(url: str, timeout_s: float) -> tuple[Any, str]:
    """Return the file system that reads by JSON and HTTP, without its retries.

    The class that gcsfs registers requests the type of the bucket by gRPC before each read, and waits up to a minute
    for the response. Both classes try six times within 33 s and print a traceback. The number of attempts is fixed when
    the class is defined, so the method inside the retries is used.
    """
    from gcsfs.core import GCSFileSystem

    from wasteddp.data.remote.web import time_limits

    limits = {"requests_timeout": time_limits(timeout_s), "session_kwargs": {"trust_env": True}}
    driver = GCSFileSystem(skip_instance_cache=True, **limits)
    driver._request = MethodType(driver._request.__wrapped__, driver)
    return driver, str(driver._strip_protocol(url))


def _open_hub(url: str, timeout_s: float) -> Store:
    """Return a store that reads each file at its address on the hub, with the login of the hub's tools.

    Hugging Face's driver lists the folder and sends a request before it reads, tries six times with its own waits,
    sleeps for minutes at a rate limit, and cannot be stopped. It is used only for listing.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    match = _HUB.fullmatch(url)
    if match is None or match["id"].split("/")[0] in ("models", "datasets", "spaces", "buckets"):
        raise SettingsError(
            f"{hide_secrets(url)} is not a folder of the Hugging Face hub",
            "there is nothing to read",
            "write hf://datasets/OWNER/NAME/FOLDER, or hf://datasets/OWNER/NAME@REVISION/FOLDER",
        )
    if constants.HF_HUB_OFFLINE:
        raise SettingsError(
            f"{hide_secrets(url)} is on the hub, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set",
            "no shard could be read",
            "unset the variable, or copy the set to a disk and name that folder",
        )
    kind = "" if match["kind"] in (None, "models") else f"{match['kind']}/"
    revision = "" if match["kind"] == "buckets" else "/" + quote(unquote(match["revision"] or "main"), safe="")
    folder = f"{constants.ENDPOINT}/{kind}{match['id']}/resolve{revision}/{quote(match['path'] or '')}"
    return replace(
        _open_web(folder, timeout_s),
        # aiohttp does not send the login after a redirect to another host, which has the large files
        options=lambda: {"headers": build_hf_headers(library_name="wasteddp")},
        listing=_open(url),
    )
