"""The workers that decode images: how many threads or processes, and the server that forks the processes.

`worker` is the code of the server and of its workers; `pool` sends them tasks.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from wasteddp.data.decoding.worker import NUMBER, REAP, START, UNKNOWN
from wasteddp.parallel import num_usable_cores

_MAX_THREADS, _MAX_PROCESSES = 8, 24
_BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_ROOT = Path(__file__).resolve().parents[3]


class DecodeServer:
    """A process that forks workers, for all pools of this process. It imports the decoders in the background.

    It is a new interpreter, so CUDA and threads of this process do not affect it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, end: int) -> int:
        """Fork a worker that owns the descriptor `end`, and return its pid. A killed server is restarted."""
        with self._lock:
            try:
                return self._request_fork(end)
            except (OSError, EOFError):
                self._stop()
                self._start()
                return self._request_fork(end)

    def exit_code(self, pid: int) -> int:
        """Return the exit code of a worker that closed its socket; -N if signal N killed it.

        UNKNOWN if another server started the worker, or the server is dead.
        """
        with self._lock:
            try:
                self._control.sendall(REAP + NUMBER.pack(pid))
                return self._receive()
            except (OSError, EOFError):
                return UNKNOWN

    def close(self) -> None:
        """Kill the server; the kernel then kills the remaining workers."""
        with self._lock:
            self._stop()

    def __enter__(self) -> DecodeServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        self._control, its = socket.socketpair()
        # blocked in the server and its workers from their first instruction: the parent handles these signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            with its:
                code = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from wasteddp.data.decoding import worker; "
                self._process = subprocess.Popen(
                    [sys.executable, "-c", f"{code}worker.serve({its.fileno()})"],
                    pass_fds=[its.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=_environment(os.environ),
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _stop(self) -> None:
        self._control.close()
        self._process.kill()  # SIGTERM is blocked there, and it has nothing to save
        self._process.wait()

    def _request_fork(self, end: int) -> int:
        socket.send_fds(self._control, [START], [end])
        return self._receive()

    def _receive(self) -> int:
        data = self._control.recv(NUMBER.size, socket.MSG_WAITALL)
        if len(data) < NUMBER.size:
            raise EOFError
        return int(NUMBER.unpack(data)[0])


@dataclass(frozen=True, slots=True)
class Workers:
    """A number of threads, or of processes if there is a server that forks them."""

    number: int
    server: DecodeServer | None = None


@contextmanager
def start_workers(asked: int | str, device_type: str, *, cores: int = 0) -> Iterator[Workers]:
    """Choose workers for a command that may use all cores, or `cores` of them; start their server if they need one.

    The server imports its modules while this process starts CUDA.

    Args:
        asked: as the setting data.workers.
        device_type: of the device that the network will run on, such as cuda.
        cores: 0: all cores that this process may use.
    """
    processes, number = device_type == "cuda", asked
    if isinstance(asked, str):
        from wasteddp.settings import Data  # takes 0.4 s, and `wasteddp predict model.onnx` does not need it

        data = Data(workers=asked)
        processes, number = data.uses_processes(device_type), data.num_workers
    number = int(number) or default_workers(cores or num_usable_cores(), processes=processes)
    if not processes:
        yield Workers(number)
        return
    with DecodeServer() as server:
        yield Workers(number, server)


def default_workers(cores: int, *, processes: bool) -> int:
    """Return the number of workers for one training process with this many cores.

    One core is reserved for the thread that launches kernels, and from five cores on another for the backward pass.
    """
    if not processes:
        return min(cores, _MAX_THREADS)
    return max(1, min(cores - (1 if cores < 5 else 2), _MAX_PROCESSES))


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the server's environment: one thread, since a process with more should not fork, and no GPUs."""
    return {**environment, **dict.fromkeys(_THREADS, "1"), "CUDA_VISIBLE_DEVICES": ""}
