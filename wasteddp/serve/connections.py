"""Bounds of connections in number and time, for clients that connect and send nothing, or one byte a second.

A connection is in one of two states, and each ends after a time that no byte prolongs:

    waiting   from its start, or the end of an answer, to the end of the next request's headers: `header_s`
    answering from there to the end of the answer: `request_s`, and `_GRACE_S` for the answer 408 or 503 to be sent

uvicorn itself limits only the wait for the first byte after an answer (5 s), and the size of the headers (16 KB).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from wasteddp.files import most_files
from wasteddp.serve.batches import Limits
from wasteddp.serve.metrics import Metrics

_GRACE_S = 5.0
_FLUSH_S = 1.0  # for a last answer to be sent


def bounded(limits: Limits, metrics: Metrics) -> type[H11Protocol]:
    """Return the class of connections for uvicorn's `http`. It counts in `metrics` what it ends."""
    most = most_files(1 / 2, limits.connections)

    class Bounded(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _state: Any = None  # the request that is answered, or (the last one,) while it waits for the next
        _got_bytes = False  # since the last answer

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type]
            metrics.num_connections = len(self.connections)
            if len(self.connections) > most:
                self._end("too many", 503, f"the server has {most:,} connections, the limit; try again later")
            else:
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            metrics.num_connections = len(self.connections)
            self._stop()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            self._got_bytes = True
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            self._got_bytes = False
            super().on_response_complete()
            self._watch()

        def _watch(self) -> None:
            """Begin the time of a new state."""
            is_answering = self.cycle is not None and not self.cycle.response_complete
            state = self.cycle if is_answering else (self.cycle,)
            if state == self._state:
                return
            self._stop()
            self._state = state
            if not self.transport.is_closing() and is_answering:
                self._timer = self.loop.call_later(limits.request_s + _GRACE_S, self._end, "answering")
            elif not self.transport.is_closing():
                self._timer = self.loop.call_later(limits.header_s, self._end_waiting)
            else:  # what was sent last may not be read
                self._timer = self.loop.call_later(limits.request_s, self.transport.abort)

        def _end_waiting(self) -> None:
            if self.transport.get_write_buffer_size():  # the client is still reading the answer
                self._timer = self.loop.call_later(limits.request_s, self._end, "answering")
            elif self._got_bytes and (self.cycle is None or self._has_whole_request()):
                self._end("waiting", 408, f"the headers did not arrive within {limits.header_s:g} s")
            else:
                self._end("waiting")

        def _has_whole_request(self) -> bool:
            """Return whether the last request was read to its end, so that another answer is not taken for its own."""
            return self.cycle is not None and not self.cycle.more_body

        def _end(self, why: str, status: int = 0, reason: str = "") -> None:
            self._stop()
            metrics.count_closed(why)
            if status:
                body = json.dumps({"error": reason}).encode()
                head = (
                    f"HTTP/1.1 {status} {'Request Timeout' if status == 408 else 'Service Unavailable'}\r\n"
                    f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
                )
                self.transport.write(head.encode() + body)
                self.transport.close()
                self._timer = self.loop.call_later(_FLUSH_S, self.transport.abort)
            else:
                self.transport.abort()

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Bounded
