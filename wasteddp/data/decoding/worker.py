"""The decoding processes: a server that forks them, and what each of them does.

The server is a new interpreter that imports the decoders once and then forks a worker whenever it is asked to. A worker
starts in milliseconds and shares the server's memory; neither has seen CUDA, threads or the training program.
`decode_pool` is the other side of both sockets.

How it ends: the server leaves when its parent's socket closes or its parent is gone, and the kernel kills the workers
with the server (PR_SET_PDEATHSIG). A worker also leaves when its own socket closes. Signals are blocked in all of them:
the parent decides what Ctrl-C and SIGTERM mean. No lock is shared, so a process may be killed at any instruction.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from hashlib import sha256
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wasteddp.data.decoding.crop import View
from wasteddp.data.decoding.decode import UndecodableError
from wasteddp.data.decoding.shared_memory import map_shared

# Sent to the server: a byte and, for START, a descriptor. Answered by a number: the worker's pid, or how it ended.
START, REAP = b"s", b"r"
NUMBER = struct.Struct("q")
_PARENT_CHECK_S = 1.0
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h

UNKNOWN = 1 << 40  # how a worker ended that another server had started

# One row of a task. `draws` has the view's numbers first; no view needs more than four.
Rows = npt.NDArray[np.void]
ROW_DTYPE = np.dtype(
    [
        ("row", "i4"),
        ("shard", "i4"),
        ("offset", "i8"),
        ("length", "i8"),
        ("sha256", "u1", (32,)),
        ("sample", "i8"),
        ("draws", "f8", (4,)),
    ]
)
# What a worker is at, in memory that its parent reads: row of its task (-1: none), sample, since when (monotonic, s).
AT_WORK_DTYPE = np.dtype([("row", "i8"), ("sample", "i8"), ("since_s", "f8")])

WHOLE = -1  # the length of a row that is a file of its own, of which no sha256 is known

UNREAD, UNDECODABLE = "unread", "undecodable"
Failure = tuple[int, str, str]  # row of the batch, UNREAD or UNDECODABLE, the reason in words
Left = tuple[int, bytes | int, tuple[int, int, int, int]]  # row, a JPEG or its length where it stands in its row, box
Answer = tuple[list[Failure], list[Left]]


def serve(descriptor: int) -> None:
    """The server's life. `descriptor`: its end of the socket to the parent."""
    parent = os.getppid()
    asked = socket.socket(fileno=descriptor)
    torch.set_num_threads(1)  # the resize must not start a team of threads for each image
    while True:
        if not select.select([asked], [], [], _PARENT_CHECK_S)[0]:
            if os.getppid() != parent:
                return
            continue
        command, descriptors, _, _ = socket.recv_fds(asked, 1, 1)
        if not command:
            return
        if command == REAP:
            asked.sendall(NUMBER.pack(_how_it_ended(*NUMBER.unpack(asked.recv(NUMBER.size, socket.MSG_WAITALL)))))
            continue
        server, worker = os.getpid(), os.fork()
        if worker == 0:
            asked.close()
            _die_with(server)
            code = 1
            try:
                work(Connection(descriptors[0]))
                code = 0
            except (EOFError, ConnectionError):
                code = 0  # the parent is gone or has no more work
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(descriptors[0])
        asked.sendall(NUMBER.pack(worker))


def work(parent: Connection) -> None:
    """A worker's life: takes tasks in the order of their coming and answers each. Raises EOFError at its end."""
    _, number, num_bytes, is_idle = parent.recv()
    at_work = np.frombuffer(map_shared(_received(parent, 1)[0], num_bytes), AT_WORK_DTYPE)[number : number + 1]
    if is_idle and hasattr(os, "SCHED_IDLE"):  # Linux; elsewhere the processes compete
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    memories: dict[int, mmap.mmap] = {}
    shards: dict[int, int] = {}
    while True:
        match parent.recv():
            case "memory", key, num_bytes:
                memories[key] = map_shared(_received(parent, 1)[0], num_bytes)
            case "shards", keys:
                shards |= zip(keys, _received(parent, len(keys)), strict=True)
            case "drop", keys:
                for key in keys:
                    os.close(shards.pop(key))
            case "rows", memory, offset, side, view, rows_offset, num_rows:
                images = np.frombuffer(memories[memory], np.uint8, offset=offset)
                rows = np.frombuffer(memories[memory], ROW_DTYPE, num_rows, rows_offset)
                answer: Answer | str
                try:
                    answer = _fill(images, side, view, rows, shards, at_work)
                except Exception:
                    answer = traceback.format_exc()
                at_work["row"] = -1
                parent.send(answer)


def _fill(
    images: npt.NDArray[np.uint8], side: int, view: View, rows: Rows, shards: dict[int, int], at_work: Any
) -> Answer:
    """Reads, proves and decodes each row into its place of the batch, uint8 [B, S, S, C] from the start of `images`."""
    failures: list[Failure] = []
    left: list[Left] = []
    num_bytes = side * side * 3
    for number, record in enumerate(rows):
        at_work["sample"], at_work["since_s"], at_work["row"] = record["sample"], time.monotonic(), number
        row = int(record["row"])
        place = images[row * num_bytes : (row + 1) * num_bytes]
        length = int(record["length"])
        try:
            data = _read(shards[int(record["shard"])], length, int(record["offset"]))
        except OSError as error:
            failures.append((row, UNREAD, error.strerror or ""))
            continue
        if length != WHOLE and sha256(data).digest() != record["sha256"].tobytes():
            failures.append((row, UNREAD, ""))  # the parent reads it too, and knows how to say what is wrong
            continue
        try:
            encoded = view.fill(place.reshape(side, side, 3), data, record["draws"])
        except UndecodableError as error:
            failures.append((row, UNDECODABLE, str(error)))
            continue
        if encoded is not None:
            if fits := len(data) <= num_bytes:
                place[: len(data)] = np.frombuffer(data, np.uint8)
            left.append((row, len(data) if fits else data, encoded.box))
    return failures, left


def _read(descriptor: int, length: int, offset: int) -> bytes:
    """From there on, or the whole file. Its position is shared with other processes and stays as it is."""
    if length != WHOLE:
        return os.pread(descriptor, length, offset)
    at_once = max(os.fstat(descriptor).st_size + 1, 1 << 16)  # /proc says 0
    data = b""
    while part := os.pread(descriptor, at_once, len(data)):
        data += part
    return data


def _how_it_ended(pid: int) -> int:
    """The exit code of a worker that has closed its socket; minus the signal that killed it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return UNKNOWN


def _received(parent: Connection, num: int) -> list[int]:
    """Descriptors, sent after a message with a byte of their own."""
    with socket.socket(fileno=os.dup(parent.fileno())) as end:
        return socket.recv_fds(end, 1, num)[1]


def _die_with(server: int) -> None:
    """The kernel kills this process when the server dies. Linux only; elsewhere the closed socket ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:  # it died before
            os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
