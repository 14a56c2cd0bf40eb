"""Image files -> square views, in the order of the files, decoded ahead by threads or by processes.

Legend: R files in one task of a worker, C = 3, S the side.

With processes, this process opens each file and sends its descriptor. So names such as /dev/stdin and <(command) refer
to the files of this process, and a file that cannot be opened has the same error as with threads. A pipe can be read
only once, so this process reads and decodes it.
"""

from __future__ import annotations

import io
import os
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from wasteddp.data.decoding.decode import ImageHWC, UndecodableError, take_tolerated
from wasteddp.data.decoding.pool import DecodePool, Task
from wasteddp.data.decoding.worker import ROW_DTYPE, TOLERATED, UNDECODABLE, WHOLE, Rows, SharedMemory
from wasteddp.data.decoding.workers import DecodeServer, Workers
from wasteddp.errors import print_warning
from wasteddp.files import most_files
from wasteddp.parallel import in_order

if TYPE_CHECKING:
    from wasteddp.data.decoding.crop import View

_FILES_AT_ONCE = 8  # R: a message costs a tenth of what decoding a small JPEG does
_PARTS_IN_FLIGHT = 2  # for each worker: one being decoded, one waiting
_OPENERS = 4  # threads: opening a file on a network file system takes a millisecond
_NO_DRAWS = np.zeros(0)
_MAX_STREAM_BYTES = 256 << 20  # as `wasteddp shard` allows for a file
_KEYS = 1 << 31  # of descriptors, int32


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The reason why a file has no view."""

    reason: str


FileView = tuple[str, ImageHWC | Unreadable]


def file_views(
    paths: Iterable[str],
    view: View,
    *,
    side_px: int,
    workers: Workers,
    warn: Callable[[str], None] = print_warning,
    tolerated: Callable[[str], None] = lambda path: None,
) -> Generator[FileView, None, None]:
    """Yield (path, uint8 [S, S, C] or `Unreadable`) for each file; the same for any number and kind of workers.

    Memory with processes: (2 * workers + 1) * R views in a mapping, R <= 8, and as many open files.

    Args:
        paths: of the files.
        view: one that does not need random numbers.
        side_px: S.
        workers: that decode.
        warn: called with a message for each process that died and was replaced.
        tolerated: called with the path of each JPEG that has faults that cost no pixel, in their order.
    """
    if workers.server is None:

        def read(path: str) -> tuple[FileView, bool]:
            out = np.empty((side_px, side_px, 3), np.uint8)
            try:
                with Path(path).open("rb", buffering=0) as file:
                    view.fill(out, file.readall() if _is_regular(file) else _read_stream(file), _NO_DRAWS)
            except (OSError, UndecodableError) as error:
                return (path, Unreadable(_describe(error))), False
            return (path, out), take_tolerated()

        for found, is_tolerated in in_order(read, paths, workers=workers.number):
            if is_tolerated:
                tolerated(found[0])
            yield found
        return
    with ExitStack() as stack:
        yield from _Processes(view, side_px, workers.number, workers.server, warn, tolerated, stack).views(paths)


@dataclass(slots=True)
class _Part:
    """R consecutive files, for one worker."""

    number: int
    first: int  # number of the first file
    paths: list[str]
    slot: int
    unreadable: dict[int, str] = field(default_factory=dict)  # by row
    tolerated: set[int] = field(default_factory=set)  # rows
    keys: list[int] = field(default_factory=list)  # of the files that were sent
    task: Task | None = None
    sent: Future[None] | None = None


class _Processes:
    def __init__(
        self,
        view: View,
        side_px: int,
        number: int,
        server: DecodeServer,
        warn: Callable[[str], None],
        tolerated: Callable[[str], None],
        stack: ExitStack,
    ) -> None:
        self._view, self._side, self._tolerated = view, side_px, tolerated
        # by key; open until a worker has answered, since a file may have to be sent again
        files = self._files = dict[int, io.FileIO]()
        stack.callback(self._close_files)
        self._num_parts = _PARTS_IN_FLIGHT * number + 1
        self._rows = max(1, min(_FILES_AT_ONCE, _most_files() // self._num_parts))
        self._image_bytes = self._rows * side_px * side_px * 3
        self._slot_bytes = self._image_bytes + self._rows * ROW_DTYPE.itemsize
        self._memory = SharedMemory(self._num_parts * self._slot_bytes)
        stack.callback(self._memory.close)
        self._pool = DecodePool(number, lambda key: nullcontext(files[key].fileno()), warn=warn, server=server)
        stack.callback(self._pool.close)
        self._pool.share(0, self._memory)
        self._openers = ThreadPoolExecutor(_OPENERS, "open")
        stack.callback(self._openers.shutdown, cancel_futures=True)

    def views(self, paths: Iterable[str]) -> Iterator[FileView]:
        source = iter(paths)
        parts = enumerate(iter(lambda: list(islice(source, self._rows)), []))
        pending: deque[_Part] = deque()
        free = deque(range(self._num_parts))
        while True:
            for number, some in islice(parts, len(free)):
                part = _Part(number, number * self._rows, some, free.popleft())
                part.sent = self._openers.submit(self._send, part)
                pending.append(part)
            if not pending:
                return
            part = pending.popleft()
            found = self._finish(part)
            free.append(part.slot)
            yield from found

    def _send(self, part: _Part) -> None:
        """Open the files and send a worker those that it can read; read and decode pipes here."""
        images, rows = self._images(part), []
        for row, path in enumerate(part.paths):
            try:
                file = Path(path).open("rb", buffering=0)  # noqa: SIM115, closed after a worker has answered
                if not _is_regular(file):
                    with file:
                        self._view.fill(images[row], _read_stream(file), _NO_DRAWS)
                    if take_tolerated():
                        part.tolerated.add(row)
                    continue
            except (OSError, UndecodableError) as error:
                part.unreadable[row] = _describe(error)
                continue
            rows.append(row)
            part.keys.append((part.first + row) % _KEYS)
            self._files[part.keys[-1]] = file
        if not rows:
            return
        at = part.slot * self._slot_bytes
        rows_at = at + self._image_bytes
        records: Rows = self._memory.view(rows_at, len(rows) * ROW_DTYPE.itemsize).view(ROW_DTYPE)
        records[:] = np.zeros(len(rows), ROW_DTYPE)
        records["row"], records["shard"], records["sample"] = rows, part.keys, [part.first + row for row in rows]
        records["length"] = WHOLE
        part.task = Task(0, at, self._side, self._view, rows_at, records)
        self._pool.submit(part.task, part.number, wanted=frozenset(part.keys))

    def _finish(self, part: _Part) -> list[FileView]:
        assert part.sent is not None
        part.sent.result()
        if part.task:
            self._pool.wait([part.task])
            assert part.task.answer is not None
            for row, kind, reason in part.task.answer[0]:
                if kind == TOLERATED:
                    part.tolerated.add(row)
                    continue
                part.unreadable[row] = reason if kind == UNDECODABLE else f"unreadable: {reason}"
        for key in part.keys:
            self._files.pop(key).close()
        for row in sorted(part.tolerated):
            self._tolerated(part.paths[row])
        images = self._images(part)
        return [
            (path, Unreadable(part.unreadable[row]) if row in part.unreadable else images[row].copy())
            for row, path in enumerate(part.paths)
        ]

    def _images(self, part: _Part) -> npt.NDArray[np.uint8]:
        """uint8 [R, S, S, C]"""
        place = self._memory.view(part.slot * self._slot_bytes, self._image_bytes)
        return place.reshape(self._rows, self._side, self._side, 3)

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()


def _is_regular(file: io.FileIO) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def _read_stream(file: io.FileIO) -> bytes:
    """Return the bytes of a pipe or a device, which may never end."""
    data = bytearray()
    while part := file.read(1 << 20):
        data += part
        if len(data) > _MAX_STREAM_BYTES:
            raise UndecodableError("too_large", f"over {_MAX_STREAM_BYTES:,} bytes from a pipe or a device")
    return bytes(data)


def _describe(error: OSError | UndecodableError) -> str:
    if isinstance(error, IsADirectoryError):  # `find_images` returns a folder only if it cannot be listed
        return "unreadable: this folder cannot be listed"
    return f"unreadable: {error.strerror}" if isinstance(error, OSError) else str(error)


def _most_files() -> int:
    """Return how many files may be open at the same time: at most half of the process's limit (1,024 by default)."""
    return most_files(1 / 2, 400)
