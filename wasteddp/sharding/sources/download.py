"""Downloads of recipes: https only, resumed after a broken connection, checked by size and hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from wasteddp.data.remote.folder import Patience, RemoteFolder
from wasteddp.errors import DamagedShardError, RecipeError, RemoteError, storage
from wasteddp.files import open_regular, sha256_of

_PATIENCE = Patience(attempts=4)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_BRING_IT = (
    "run it again where there is a network (it goes on where it stopped), or bring the file from another machine and "
    "name it or its folder: wasteddp shard RECIPE --from FILE-or-FOLDER"
)


class Download(BaseModel):
    """A file to download. `git_blob` is the id that git gives the content: sha1 of "blob SIZE\\0" and the bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    file: str = Field(pattern=r"^[^/\\]+$")
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    git_blob: str = Field(default="", pattern=r"^([0-9a-f]{40})?$")
    size_bytes: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _needs_proof(self) -> Download:
        if not self.sha256 and not self.git_blob:
            raise ValueError("neither sha256 nor git_blob is given, so other bytes would not be noticed")
        return self


def fetch(
    wanted: Download,
    folder: Path,
    *,
    allow_http_loopback: bool = False,
    wait: Callable[[float], None] | None = None,
) -> Path:
    """Download the file into `folder`, unless it is there with the right hash, and return its path.

    Raises:
        RecipeError: the URL is not https, all attempts failed, or the bytes are not those that the recipe promises.
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
    above, _, name = parts.path.rpartition("/")
    remote = RemoteFolder(urlunsplit(parts._replace(path=above)), _PATIENCE, wait=wait)
    try:
        with storage("writing the download", part), os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT), "r+b") as file:
            file.seek(0, os.SEEK_END)
            remote.fetch(unquote(name), file, wanted.size_bytes)
        difference = _difference(wanted, part)
    except RemoteError as error:
        raise RecipeError(error.found, "the images of this recipe are not here", _BRING_IT) from error
    except DamagedShardError as error:
        difference = error.found
    finally:
        remote.close()
    if difference:
        part.unlink()  # the next start would append to the wrong bytes
        raise RecipeError(
            f"{wanted.url} is not what the recipe promises: {difference}",
            "the set would not be the one that the recipe describes",
            f"if it stays so, the file was removed or replaced; {_BRING_IT}",
        )
    with storage("keeping the download", path):
        part.replace(path)
    return path


def _difference(wanted: Download, path: Path) -> str:
    """Return how a file differs from what is wanted; empty if it does not."""
    size = path.stat().st_size
    if wanted.size_bytes not in (None, size):
        return f"{size:,} bytes instead of {wanted.size_bytes:,}"
    with open_regular(path) as file:
        blob = partial(hashlib.sha1, b"blob %d\0" % size, usedforsecurity=False)
        found = {"sha256": sha256_of(path), "git_blob": hashlib.file_digest(file, blob).hexdigest()}
    wrong = [
        f"{name} {digest} instead of {promised} ({size:,} bytes)"
        for name, digest in found.items()
        if (promised := getattr(wanted, name)) not in ("", digest)
    ]
    return ", ".join(wrong)
