"""Files from the web, whole and proved: https only, resumed after a break, checked by size and hash."""

from __future__ import annotations

import errno
import hashlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from wasteddp.errors import RecipeError, storage

_TIMEOUT_S = 30.0
_ATTEMPTS = 4
_CHUNK_BYTES = 1 << 18
_WORTH_ANOTHER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Download:
    """A file to be had. `git_blob` is the id that git gives the content: sha1 of "blob SIZE\\0" and the bytes."""

    url: str
    file: str
    sha256: str = ""
    git_blob: str = ""
    size_bytes: int | None = None


def fetch(
    wanted: Download,
    folder: Path,
    *,
    allow_http_loopback: bool = False,
    wait: Callable[[float], None] = time.sleep,
) -> Path:
    """The path of the file in `folder`, downloaded unless it is there and good.

    Raises:
        RecipeError: not https, not to be had after a few attempts, or not the bytes that the recipe promises.
    """
    parts = urlsplit(wanted.url)
    if parts.scheme != "https" and not (allow_http_loopback and parts.hostname in _LOOPBACK):
        raise RecipeError(f"{wanted.url} is not https", "anybody on the way could change it", "give an https address")
    path = folder / wanted.file
    part = path.with_name(path.name + ".part")
    with storage("making the download folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and not _difference(wanted, path):
        return path
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _resume(wanted.url, part)
            break
        except OSError as error:  # urllib's errors are OSErrors too
            _stop_unless_worth_another(error, wanted, attempt)
            wait(2.0 ** (attempt - 1))
    difference = _difference(wanted, part)
    if difference:
        part.unlink()  # nothing of it can be trusted, and the next start would only add to it
        raise RecipeError(
            f"{wanted.url} is not what the recipe promises: {difference}",
            "the set would not be the one that the recipe describes",
            "try again; if it stays so, the file was replaced: get the right one and give it with --from",
        )
    with storage("keeping the download", path):
        part.replace(path)
    return path


def _resume(url: str, part: Path) -> None:
    """Fetches what is missing of `part`; a server that does not know ranges sends all of it again."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "wasteddp"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            expected = response.headers.get("Content-Length")
            begin = have if response.status == HTTPStatus.PARTIAL_CONTENT else 0
            with part.open("ab" if begin else "wb") as file:
                while chunk := response.read(_CHUNK_BYTES):
                    file.write(chunk)
            got = part.stat().st_size - begin
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # nothing is missing; the hash will judge it
            return
        raise
    except HTTPException as error:
        raise ConnectionError(f"the connection broke: {error}") from error
    if expected is not None and got < int(expected):
        raise ConnectionError(f"the connection ended after {got:,} of {int(expected):,} bytes")


def _stop_unless_worth_another(error: OSError, wanted: Download, attempt: int) -> None:
    """Raises `RecipeError` when the last attempt failed, or the server's answer will not change."""
    final = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in _WORTH_ANOTHER
    if error.errno in (errno.ENOSPC, errno.EACCES, errno.EDQUOT):
        with storage("writing the download", wanted.file):
            raise error
    if final or attempt == _ATTEMPTS:
        raise RecipeError(
            f"{wanted.url} cannot be downloaded (attempt {attempt} of {_ATTEMPTS}): {error}",
            "the images of this recipe are not here",
            "run it again where there is a network (it goes on where it stopped), or bring the file from another "
            "machine and name it or its folder: wasteddp shard RECIPE --from FILE-or-FOLDER",
        ) from error


def _difference(wanted: Download, path: Path) -> str:
    """How a file differs from what is wanted, or nothing."""
    size = path.stat().st_size
    if wanted.size_bytes is not None and size != wanted.size_bytes:
        return f"{size:,} bytes instead of {wanted.size_bytes:,}"
    checks = [("sha256", wanted.sha256, hashlib.sha256()), ("git blob id", wanted.git_blob, _git_blob_hash(size))]
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            for _, _, digest in checks:
                digest.update(chunk)
    for name, promised, digest in checks:
        if promised and digest.hexdigest() != promised:
            return f"{name} {digest.hexdigest()} instead of {promised} ({size:,} bytes)"
    return ""


def _git_blob_hash(size_bytes: int) -> hashlib._Hash:
    return hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
