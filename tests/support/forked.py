"""Processes that have imported torch, torch._dynamo and the training program when they begin: forked from one that has.

A start costs 0.1 s instead of the 6 s that the imports take. `Popen` is subprocess.Popen for a command of this Python:
[sys.executable, FILE, ARGUMENT, ...], with -c CODE or -m MODULE in the place of FILE. The process is a child of this
one, with its own pid, signals and exit code. Two things are not as after a real start: variables that Python or the
imports read have no effect, and /proc/PID/cmdline is that of the server. Other systems than Linux start the command.

As a program, this is the server: forked.py DESCRIPTOR.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Any

__all__ = ["DEVNULL", "PIPE", "STDOUT", "Popen", "run"]

ROOT = Path(__file__).parents[2]
_MODULES = (
    "torch._dynamo",
    "torchvision.models",
    "wasteddp.train",
    "wasteddp.cli",
    "wasteddp.inference.evaluate",
    "narrow",
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
_MESSAGE_BYTES = 150_000


class _Server:
    """The process that the others are forked from. It ends when this one does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self._close)

    def _close(self) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, command: dict[str, Any], descriptors: list[int]) -> int:
        """Returns the pid of a new child of this process. It is an orphan of the server's child, and comes to us."""
        prctl = ctypes.CDLL(None).prctl
        with self._lock:
            prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._socket, [json.dumps(command).encode()], descriptors)
                pid = self._socket.recv(100)
            finally:
                prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        assert pid, "the process that the others are forked from has ended: it printed why"
        return int(pid)


_server: _Server | None = None


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    def _execute_child(self, args: list[str], *rest: Any) -> None:  # private, with the same arguments since Python 3.11
        if sys.platform != "linux":
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        global _server
        _server = _server or _Server()
        assert args[0] == sys.executable, args
        _, _, _, _, cwd, env, _, _, _, *pipes = rest[:15]
        environment = dict(os.environ if env is None else env)
        command = {"argv": [str(word) for word in args[1:]], "cwd": str(cwd or Path.cwd()), "environment": environment}
        child_ends = pipes[0], pipes[3], pipes[5]
        descriptors = [standard if end == -1 else end for standard, end in enumerate(child_ends)]
        self.pid = _server.start(command, descriptors)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run(command: list[str], *, cwd: Path = ROOT, timeout: float = 300, **how: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run with capture_output, text and check=False."""
    with Popen(command, cwd=cwd, stdout=PIPE, stderr=PIPE, text=True, **how) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _serve(connection: socket.socket) -> list[str]:
    """Forks for each message; returns in the new process, with its arguments."""
    for module in _MODULES:
        importlib.import_module(module)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread would not be there after a fork"
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 3)
        if not message:
            os._exit(0)
        read, write = os.pipe()
        between = os.fork()
        if not between:
            pid = os.fork()
            if pid:
                os.write(write, str(pid).encode())
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.0005)
            connection.close()
            return _become(json.loads(message), descriptors, (read, write))
        os.waitpid(between, 0)
        connection.send(os.read(read, 100))
        for descriptor in (read, write, *descriptors):
            os.close(descriptor)


def _become(command: dict[str, Any], descriptors: list[int], others: tuple[int, int]) -> list[str]:
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
    for descriptor in (*descriptors, *others):
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(command["cwd"])
    argv: list[str] = command["argv"]
    given = command["environment"].get("PYTHONPATH", "").split(os.pathsep)
    first = "" if argv[0] in ("-c", "-m") else str(Path(argv[0]).resolve().parent)
    sys.path[:2] = [first, *filter(None, given)]  # in the place of this folder and ROOT
    return argv


def _run_program(argv: list[str]) -> None:
    option, *words = argv
    sys.argv = argv
    if option == "-c":
        sys.argv = ["-c", *words[1:]]
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    _run_program(_serve(socket.socket(fileno=int(sys.argv[1]))))
