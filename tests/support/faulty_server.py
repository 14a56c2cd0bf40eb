"""A threaded HTTP server on loopback that serves a folder and injects faults."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from urllib.parse import unquote

Fault = str  # "500", "404", ..., "cut", "reset", "stall", "flip", "endless"
Faults = Callable[[str, int], Fault | None]  # file name, how often it was asked for before -> what goes wrong


@dataclass(frozen=True)
class Answer:
    """A response that is sent instead of a file."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


Route = Callable[[str, Message], "str | Answer"]  # request path and headers -> the file's name, or an answer


def plain(asked: str, headers: Message) -> str:
    """The route of a plain web server: the path is the name."""
    return unquote(asked.partition("?")[0].lstrip("/"))


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder and counts the requests.

    Args:
        folder: the served folder.
        ranges: whether `Range` is supported; `python -m http.server` does not support it.
        route: maps a request to a file.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, *, ranges: bool = True, route: Route = plain) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges, self.route = folder, ranges, route
        self.faults: Faults = lambda name, number: None
        self.asked: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.ended = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetches(self, suffix: str = ".tar") -> dict[str, int]:
        """Return how often each file was requested from its first byte."""
        return {name: count for name, count in sorted(self.asked.items()) if name.endswith(suffix)}

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # some tests disconnect clients


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.server.route(self.path, self.headers)
        if isinstance(name, Answer):
            self._head(name.status, len(name.body), name.headers)
            self.wfile.write(name.body)
            return
        path = self.server.folder / name
        wanted = self.headers.get("Range") if self.server.ranges else None
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        with self.server.lock:
            number = self.server.asked[name]
            self.server.asked[name] += first == "0"
            fault = self.server.faults(name, number)
        if fault and fault.isdigit():
            self._head(int(fault), 0)
            return
        if not path.is_file():
            self._head(404, 0)
            return
        content = path.read_bytes()
        if int(first) >= len(content) > 0:
            self._head(416, 0)
            return
        if fault == "endless":
            self._flood()
            return
        body = content[int(first) : int(last or len(content)) + 1]
        span = {"Content-Range": f"bytes {first}-{int(first) + len(body) - 1}/{len(content)}"} if wanted else {}
        self._head(206 if wanted else 200, len(body), span)
        self._send(body, fault)

    def do_HEAD(self) -> None:
        name = self.server.route(self.path, self.headers)
        if isinstance(name, Answer):
            self._head(name.status, len(name.body), name.headers)
            return
        path = self.server.folder / name
        self._head(200 if path.is_file() else 404, path.stat().st_size if path.is_file() else 0)

    def _send(self, body: bytes, fault: Fault | None) -> None:
        if fault == "flip":
            body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
        if fault in ("cut", "reset", "stall"):
            body = body[: len(body) // 2]
        with self.server.lock:
            self.server.bytes_sent[self.path] += len(
                body
            )  # before the last byte: after it, the client may read the count
        self.wfile.write(body)
        if fault == "cut":
            self.close_connection = True
        elif fault == "reset":
            linger = b"\1\0\0\0\0\0\0\0"  # struct linger: on, 0 s: closing sends a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
        elif fault == "stall":
            self.server.ended.wait(60)

    def _flood(self) -> None:
        """A body without an end, whose length no header gives."""
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while not self.server.ended.is_set():
            self.wfile.write(bytes(1 << 16))
            self.server.bytes_sent[self.path] += 1 << 16

    def _head(self, status: int, length: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes" if self.server.ranges else "none")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(
    folder: Path, *, ranges: bool = True, route: Route = plain, tls: ssl.SSLContext | None = None
) -> Iterator[FaultyServer]:
    """A server of the folder, in threads of this process."""
    with FaultyServer(folder, ranges=ranges, route=route) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


def until(condition: Callable[[], object], *, limit_s: float = 30.0) -> None:
    """Wait until the condition is true."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"the condition was still false after {limit_s:g} s"
        time.sleep(0.01)
