"""Reads http and https with fsspec's driver: with time limits, without redirects to http, with a bounded body."""

from __future__ import annotations

import re
from typing import Any

from aiohttp import ClientResponse, ClientTimeout, TraceConfig
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from wasteddp.data.remote.filesystems import DowngradeError, WrongSizeError

_HEADERS = {"User-Agent": "wasteddp", "Accept-Encoding": "identity"}
_MOST_BYTES = 1 << 30  # limit of a body of unknown size


class Web(HTTPFileSystem):  # type: ignore[misc]
    """A file system whose `cat_file` also takes `size`, the bytes that the whole file must have."""

    def __init__(self, timeout_s: float) -> None:
        trace = TraceConfig()
        trace.on_request_redirect.append(_refuse_downgrade)
        # trust_env: proxies of the environment
        session = {"timeout": time_limits(timeout_s), "trust_env": True, "headers": _HEADERS, "trace_configs": [trace]}
        super().__init__(client_kwargs=session, skip_instance_cache=True)

    async def _cat_file(
        self, url: str, start: int | None = None, end: int | None = None, size: int | None = None, **options: Any
    ) -> bytes:
        if start is not None and end is not None:
            options["headers"] = {**options.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
        session = await self.set_session()
        async with session.get(self.encode_url(url), **options) as response:
            self._raise_not_found_for_status(response, url)
            found = _size_of_file(response)
            if size is not None and found not in (None, size):
                raise WrongSizeError(found, size)
            most = size if size is not None else response.content_length or _MOST_BYTES
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > most:
                    raise WrongSizeError(len(body), most)
        return bytes(body)


def time_limits(timeout_s: float) -> ClientTimeout:
    """Return the time limit for connecting and for each read; the whole request has no limit."""
    return ClientTimeout(total=None, connect=None, sock_connect=timeout_s, sock_read=timeout_s)


def _size_of_file(response: ClientResponse) -> int | None:
    """Return the size of the whole file if the response states it. The body may be a part."""
    if response.status == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if re.fullmatch(r"[0-9]{1,18}", total) else None
    return None if "Content-Encoding" in response.headers else response.content_length


async def _refuse_downgrade(session: Any, context: Any, redirect: Any) -> None:
    there = redirect.url.join(URL(redirect.response.headers.get("Location", "")))
    if redirect.url.scheme == "https" and there.scheme == "http":
        redirect.response.close()
        raise DowngradeError
