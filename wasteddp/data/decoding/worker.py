"""The decoding processes: a server that forks workers, the workers, and the memory that they write to.

The server is a new interpreter that imports the decoders once and then forks a worker on each request. A worker starts
in milliseconds and shares the server's memory. Neither has loaded CUDA, threads or the training program. `workers` has
the other end of their sockets.

The server exits when its parent closes the socket or ends, and the kernel kills the workers with the server
(PR_SET_PDEATHSIG). A worker also exits when its own socket closes. Signals are blocked in all of them, since the parent
handles Ctrl-C and SIGTERM. The processes share no locks, so a process may be killed at any instruction.

The shared memory has no name, so nothing remains after the processes end. A memfd does not use /dev/shm, which
containers limit to 64 MB, but counts as memory of the container. If the kernel or a seccomp profile refuses it, an
unlinked file in /dev/shm or in the folder for temporary files is used instead. All pages are reserved at the start,
since writing to a page that is not available would be a bus error.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from hashlib import sha256
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wasteddp.data.decoding.decode import UndecodableError, take_tolerated
from wasteddp.errors import SettingsError
from wasteddp.files import read_at
from wasteddp.parallel import die_with_parent

if TYPE_CHECKING:
    from wasteddp.data.decoding.crop import View

# One row of a task. `draws` begins with the random numbers of the view, at most four.
Rows = npt.NDArray[np.void]
Failure = tuple[int, str, str]  # row of the batch, UNREAD, UNDECODABLE or TOLERATED, message
Left = tuple[int, bytes | int, tuple[int, int, int, int]]  # row; a JPEG, or its length if the row holds it; box
Answer = tuple[list[Failure], list[Left]]

# A request to the server is a byte, with a descriptor for START. The answer is a number: a worker's pid or exit code.
START, REAP = b"s", b"r"
NUMBER = struct.Struct("q")
UNKNOWN = 1 << 40  # the exit code of a worker that another server started
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
# A worker's current row of its task (-1: none), sample and start time (monotonic, s), in memory that its parent reads.
AT_WORK_DTYPE = np.dtype([("row", "i8"), ("sample", "i8"), ("since_s", "f8")])
WHOLE = -1  # the length of a row that is a whole file, whose sha256 is not known
UNREAD, UNDECODABLE = "unread", "undecodable"
TOLERATED = "tolerated"  # of a whole file: decoded, in spite of faults that cost no pixel
_PARENT_CHECK_S = 1.0


def serve(descriptor: int) -> None:
    """Run the server. `descriptor` is its end of the socket to the parent."""
    import torch

    import wasteddp.data.decoding.crop  # noqa: F401, the workers are forked with it

    parent = os.getppid()
    requests = socket.socket(fileno=descriptor)
    torch.set_num_threads(1)  # resizing must not start a team of threads for each image
    while True:
        if not select.select([requests], [], [], _PARENT_CHECK_S)[0]:
            if os.getppid() != parent:
                return
            continue
        command, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
        if not command:
            return
        if command == REAP:
            requests.sendall(
                NUMBER.pack(_wait_for_exit(*NUMBER.unpack(requests.recv(NUMBER.size, socket.MSG_WAITALL))))
            )
            continue
        server, worker = os.getpid(), os.fork()
        if worker == 0:
            requests.close()
            _die_with(server)
            code = 1
            try:
                work(Connection(descriptors[0]))
                code = 0
            except (EOFError, ConnectionError):
                code = 0  # the parent ended or closed the socket
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(descriptors[0])
        requests.sendall(NUMBER.pack(worker))


def work(parent: Connection) -> None:
    """Run a worker: receive messages and answer tasks in order, until EOFError, when the parent closes the socket."""
    _, number, num_bytes, is_idle = parent.recv()
    at_work = np.frombuffer(map_shared(_receive_descriptors(parent, 1)[0], num_bytes), AT_WORK_DTYPE)[
        number : number + 1
    ]
    if is_idle and hasattr(os, "SCHED_IDLE"):  # Linux; elsewhere the processes compete
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    memories: dict[int, mmap.mmap] = {}
    shards: dict[int, int] = {}
    while True:
        match parent.recv():
            case "memory", key, num_bytes:
                memories[key] = map_shared(_receive_descriptors(parent, 1)[0], num_bytes)
            case "shards", keys:
                shards |= zip(keys, _receive_descriptors(parent, len(keys)), strict=True)
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


class SharedMemory:
    """A mapping of `num_bytes`, and the descriptor with which other processes map the same memory."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.descriptor, self.kind = _reserve(num_bytes)
        self._map = mmap.mmap(self.descriptor, num_bytes)
        self._registered_at = 0

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Return a part of the memory, uint8 [num_bytes]. The mapping exists as long as one of its views does."""
        return np.frombuffer(self._map, np.uint8, num_bytes, offset)

    def register_with_cuda(self) -> bool:
        """Page-lock the memory, so that a GPU copies from it directly; return whether the driver allowed it."""
        address = self.view(0, self.num_bytes).ctypes.data
        # Source: CUDA Runtime API, cudaHostRegister; flags 0 is cudaHostRegisterDefault
        if int(_cudart().cudaHostRegister(address, self.num_bytes, 0)) != 0:
            return False
        self._registered_at = address
        return True

    def close(self) -> None:
        """Close the descriptor. The pages are freed after the last view is deleted."""
        if self._registered_at:
            import torch

            torch.cuda.synchronize()  # a copy from the memory may be in progress
            _cudart().cudaHostUnregister(self._registered_at)
            self._registered_at = 0
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _cudart() -> Any:
    import torch  # imported here, since the rest of the module does not need it

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def map_shared(descriptor: int, num_bytes: int) -> mmap.mmap:
    """Map the memory of a descriptor from another process, and close the descriptor."""
    try:
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def _fill(
    images: npt.NDArray[np.uint8], side: int, view: View, rows: Rows, shards: dict[int, int], at_work: Any
) -> Answer:
    """Read, check and decode each row into its place in the batch: uint8 [B, S, S, C], at the start of `images`."""
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
            failures.append((row, UNREAD, ""))  # the parent reads it again and creates the message
            continue
        try:
            encoded = view.fill(place.reshape(side, side, 3), data, record["draws"])
        except UndecodableError as error:
            failures.append((row, UNDECODABLE, str(error)))
            continue
        finally:
            is_tolerated = take_tolerated()
        if is_tolerated and length == WHOLE:
            failures.append((row, TOLERATED, ""))
        if encoded is not None:
            if fits := len(data) <= num_bytes:
                place[: len(data)] = np.frombuffer(data, np.uint8)
            left.append((row, len(data) if fits else data, encoded.box))
    return failures, left


def _read(descriptor: int, length: int, offset: int) -> bytes:
    """Read `length` bytes from `offset` on, or the whole file, without moving the position that processes share."""
    if length != WHOLE:
        return read_at(descriptor, length, offset)
    at_once = max(os.fstat(descriptor).st_size + 1, 1 << 16)  # files in /proc have size 0
    data = b""
    while part := os.pread(descriptor, at_once, len(data)):
        data += part
    return data


def _wait_for_exit(pid: int) -> int:
    """Return the exit code of a worker that closed its socket; -N if signal N killed it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return UNKNOWN


def _receive_descriptors(parent: Connection, num: int) -> list[int]:
    """Receive descriptors, which follow a message with a separate byte."""
    with socket.socket(fileno=os.dup(parent.fileno())) as end:
        return socket.recv_fds(end, 1, num)[1]


def _die_with(server: int) -> None:
    """Let the kernel kill this process when the server dies. Linux only; elsewhere it ends when its socket closes."""
    die_with_parent(signal.SIGKILL)
    if sys.platform == "linux":
        if os.getppid() != server:  # it has already died
            os._exit(0)


def _reserve(num_bytes: int) -> tuple[int, str]:
    """Reserve memory of the first kind that is available; return (descriptor, kind)."""
    refused = []
    for kind, make in _KINDS.items():
        descriptor = -1
        try:
            descriptor = make()
            os.ftruncate(descriptor, num_bytes)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(descriptor, 0, num_bytes)
            return descriptor, kind
        except (OSError, AttributeError) as error:
            refused.append(f"{kind}: {getattr(error, 'strerror', None) or 'this system does not have it'}")
            if descriptor >= 0:
                os.close(descriptor)
    raise SettingsError(
        f"{num_bytes:,} bytes of shared memory for the decoding processes are not available ({'; '.join(refused)})",
        "the processes would have no memory for their images",
        f"free that much memory or disk space, set TMPDIR to a folder that has it ({tempfile.gettempdir()} was tried), "
        "set data.prefetch or train.batch_size lower, or decode in threads: data.workers='4 threads', for a command "
        "--workers '4 threads'",
    )


def _open_memfd() -> int:
    return os.memfd_create("wasteddp")


def _open_unlinked(folder: str | None) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


_KINDS: dict[str, Callable[[], int]] = {
    "memfd": _open_memfd,
    "/dev/shm": lambda: _open_unlinked("/dev/shm"),
    "a temporary file": lambda: _open_unlinked(None),
}
