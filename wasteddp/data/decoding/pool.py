"""A pool of decoding processes: it sends tasks to workers, and replaces workers that die.

A task is some rows of a batch. Each worker has its own socket, which queues its tasks, so no process waits for a lock
that a killed process could hold. A worker that dies is replaced, and the new worker gets its unanswered tasks. A task
writes only its own rows, so running it twice has no effect. A row at which two workers died counts as a failed row.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from wasteddp.data.decoding.worker import AT_WORK_DTYPE, UNKNOWN, Answer, Failure, Rows, SharedMemory
from wasteddp.data.decoding.workers import DecodeServer
from wasteddp.errors import WorkerError
from wasteddp.files import most_files

if TYPE_CHECKING:
    from wasteddp.data.decoding.crop import View

KILLED = "killed"  # a kind of failure, as is `worker.UNREAD`

_DEATHS_OF_A_ROW = 2
_DEATHS_IN_A_ROW = 10  # of a worker, without an answer in between
_DESCRIPTORS_AT_ONCE = 200  # Linux sends at most 253 in a message (SCM_MAX_FD)

OpenShard = Callable[[int], AbstractContextManager[int]]  # the descriptor of a shard, by number


@dataclass(slots=True)
class Task:
    """Rows of a batch for one worker."""

    memory: int  # key of the memory that holds the batch
    offset: int  # of the batch in the memory, bytes
    side: int  # S
    view: View
    rows_offset: int  # of the rows' records in the memory, bytes
    rows: Rows  # [n], the records themselves
    is_sent: bool = False
    answer: Answer | None = None
    killed: list[Failure] = field(default_factory=list)  # rows that killed workers
    deaths: dict[int, int] = field(default_factory=dict)  # by row of the batch


@dataclass(slots=True)
class _Worker:
    number: int
    pid: int
    end: Connection
    tasks: deque[Task] = field(default_factory=deque)
    shards: dict[int, None] = field(default_factory=dict)  # open shards, the oldest first
    deaths: int = 0  # without an answer in between


class DecodePool:
    """Processes that fill rows of batches.

    Args:
        num_workers: number of processes.
        open_shard: returns a context with the descriptor of a shard; it may wait for the shard.
        is_idle: the workers run only when a core has no other work (Linux).
        warn: called with a message for each worker that died.
        server: forks the workers; if left out, the pool starts its own.
    """

    def __init__(
        self,
        num_workers: int,
        open_shard: OpenShard,
        *,
        warn: Callable[[str], None],
        is_idle: bool = False,
        server: DecodeServer | None = None,
    ) -> None:
        self._open_shard, self._is_idle, self._warn = open_shard, is_idle, warn
        self._memories: dict[int, SharedMemory] = {}
        self._at_work = SharedMemory(num_workers * AT_WORK_DTYPE.itemsize)
        self.at_work = self._at_work.view(0, self._at_work.num_bytes).view(AT_WORK_DTYPE)
        self.at_work["row"] = -1
        self._lock = threading.RLock()  # a thread of the loader sends the tasks of a remote set
        self._broken: WorkerError | None = None
        self._selector = selectors.DefaultSelector()
        self._server, self._is_own_server = server or DecodeServer(), server is None
        self._workers: list[_Worker] = []
        try:
            for number in range(num_workers):
                self._workers.append(self._start(number))
        except BaseException:
            self.close()
            raise

    @property
    def server(self) -> DecodeServer:
        return self._server

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def share(self, key: int, memory: SharedMemory) -> None:
        """Map a memory in all workers, including those that start later."""
        with self._lock:
            self._memories[key] = memory
            for worker in self._workers:
                _send_memory(worker, key, memory)

    def submit(self, task: Task, worker: int, *, wanted: frozenset[int] | None = None) -> None:
        """Send a task to a worker, with the descriptors of the shards that it does not have open.

        Args:
            task: to run.
            worker: its number, modulo the number of workers.
            wanted: the shards that the worker may keep open; it closes all others. None: the last `most_shards`.
        """
        needed = dict.fromkeys(task.rows["shard"].tolist())
        with ExitStack() as stack:
            # wait without the lock, so that another thread can receive answers meanwhile
            descriptors = {shard: stack.enter_context(self._open_shard(shard)) for shard in needed}
            with self._lock:
                target = self._workers[worker % len(self._workers)]
                target.tasks.append(task)
                task.is_sent = True
                _send_task(target, task, descriptors, wanted)

    def drop(self, shard: int) -> None:
        """Close a shard in all workers, because its file was replaced."""
        with self._lock:
            for worker in self._workers:
                if shard in worker.shards:
                    del worker.shards[shard]
                    _send(worker, ("drop", [shard]))

    def wait(self, tasks: Iterable[Task]) -> None:
        """Wait until all tasks are answered.

        Raises:
            WorkerError: a worker dies each time it is started.
            RuntimeError: a worker raised an unexpected exception; the message has its traceback.
        """
        for task in tasks:
            while task.answer is None:
                if self._broken:
                    raise self._broken
                for key, _ in self._selector.select():
                    self._receive(key.data)

    def close(self) -> None:
        with self._lock:
            for worker in self._workers:
                worker.end.close()
            self._selector.close()
            if self._is_own_server:
                self._server.close()
            self._at_work.close()

    # --- one worker -------------------------------------------------------------------------------------------------

    def _start(self, number: int) -> _Worker:
        ours, its = socket.socketpair()
        with its:
            pid = self._server.fork(its.fileno())
        worker = _Worker(number, pid, Connection(ours.detach()))
        _send(worker, ("start", number, self._at_work.num_bytes, self._is_idle))
        _send_descriptors(worker, [self._at_work.descriptor])
        for key, memory in self._memories.items():
            _send_memory(worker, key, memory)
        self._selector.register(worker.end, selectors.EVENT_READ, number)
        return worker

    def _receive(self, number: int) -> None:
        with self._lock:
            worker = self._workers[number]
            try:
                answer = worker.end.recv()
            except (EOFError, OSError):
                self._replace(worker)
                return
            worker.deaths = 0
            task = worker.tasks.popleft()
            if isinstance(answer, str):
                task.answer = [], []
                raise RuntimeError(f"in the decoding process {number}:\n{answer}")
            failures, left = answer
            task.answer = sorted([*failures, *task.killed]), left

    def _replace(self, dead: _Worker) -> None:
        """Start another worker with the same tasks; a row at which a second worker died is removed from its task."""
        self._selector.unregister(dead.end)
        dead.end.close()
        how = _describe_end(self._server.exit_code(dead.pid))
        at = self.at_work[dead.number]
        where = ""
        if dead.tasks and 0 <= at["row"] < len(dead.tasks[0].rows):
            task, index = dead.tasks[0], int(at["row"])
            row = int(task.rows[index]["row"])
            where = f" at sample {int(at['sample'])}"
            task.deaths[row] = task.deaths.get(row, 0) + 1
            if task.deaths[row] >= _DEATHS_OF_A_ROW:
                task.rows[index:-1] = task.rows[index + 1 :].copy()
                task.rows = task.rows[:-1]
                task.killed.append((row, KILLED, f"it killed {_DEATHS_OF_A_ROW} decoding processes (the last {how})"))
        at["row"] = -1
        self._warn(f"decoding process {dead.number} (pid {dead.pid}) {how}{where}; a new one replaces it")
        if dead.deaths + 1 >= _DEATHS_IN_A_ROW:
            self._broken = WorkerError(
                f"decoding process {dead.number} {how} {_DEATHS_IN_A_ROW} times in a row without finishing a task",
                "no batch would ever be complete",
                "look for an out-of-memory message in the log of the kernel (dmesg) or the cluster; if there is one, "
                "set data.workers (for a command, --workers) to fewer processes, or to threads, such as '4 threads'",
            )
            raise self._broken
        fresh = self._start(dead.number)
        fresh.deaths = dead.deaths + 1
        self._workers[dead.number] = fresh
        for task in dead.tasks:
            fresh.tasks.append(task)
            with ExitStack() as stack:
                needed = dict.fromkeys(task.rows["shard"].tolist())
                descriptors = {shard: stack.enter_context(self._open_shard(shard)) for shard in needed}
                _send_task(fresh, task, descriptors, None)

    def find_longest(self) -> tuple[int, int, float] | None:
        """Return (worker, sample, seconds) for the worker that is longest at one sample; None if all are idle."""
        busy = [
            (float(entry["since_s"]), number, int(entry["sample"]))
            for number, entry in enumerate(self.at_work.copy())
            if entry["row"] >= 0
        ]
        if not busy:
            return None
        since_s, number, sample = min(busy)
        return number, sample, time.monotonic() - since_s


def most_shards() -> int:
    """Return how many shards a worker keeps open, and how many a task should need at most."""
    return most_files(1 / 8, 128)


def _describe_end(code: int) -> str:
    if code == UNKNOWN:
        return "was killed with the server of the decoding processes"
    if code >= 0:
        return f"ended with code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def _send_task(worker: _Worker, task: Task, descriptors: Mapping[int, int], wanted: frozenset[int] | None) -> None:
    if wanted is None:
        past = list(worker.shards)[: max(0, len(worker.shards) - most_shards())]
    else:
        past = [shard for shard in worker.shards if shard not in wanted]
    past = [shard for shard in past if shard not in descriptors]
    if past:
        for shard in past:
            del worker.shards[shard]
        _send(worker, ("drop", past))
    missing = [shard for shard in descriptors if shard not in worker.shards]
    for at in range(0, len(missing), _DESCRIPTORS_AT_ONCE):
        some = missing[at : at + _DESCRIPTORS_AT_ONCE]
        _send(worker, ("shards", some))
        _send_descriptors(worker, [descriptors[shard] for shard in some])
    worker.shards |= dict.fromkeys(missing)
    _send(worker, ("rows", task.memory, task.offset, task.side, task.view, task.rows_offset, len(task.rows)))


def _send_memory(worker: _Worker, key: int, memory: SharedMemory) -> None:
    _send(worker, ("memory", key, memory.num_bytes))
    _send_descriptors(worker, [memory.descriptor])


def _send(worker: _Worker, message: tuple[Any, ...]) -> None:
    # Not `Connection.send`: it sends io.BytesIO.getbuffer(). If the worker is dead, the traceback of the error keeps
    # that buffer until it is garbage-collected, which crashes Python 3.12.1.
    data = pickle.dumps(message)
    with _ignore_dead_worker():
        worker.end.send_bytes(data)


def _send_descriptors(worker: _Worker, descriptors: list[int]) -> None:
    with _ignore_dead_worker(), socket.socket(fileno=os.dup(worker.end.fileno())) as end:
        socket.send_fds(end, [b"d"], descriptors)


@contextmanager
def _ignore_dead_worker() -> Iterator[None]:
    """Ignore that a worker died: `wait` notices it, and sends its messages to a new worker."""
    with suppress(BrokenPipeError, ConnectionResetError):
        yield
