"""Programs whose file operations are recorded, or of which one fails: disk.c, loaded before all other libraries.

This process loads it at its own start (`load_again`), and the programs are forked from it, as in `attempts`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("disk.c")
LIMIT_S = 90.0  # for a program; longer counts as a hang, which is a failure


class CannotError(Exception):
    """This machine cannot do it."""


def load_again() -> None:
    """Compile disk.c and execute this program again with it, unless it is loaded. Linux only.

    Raises:
        CannotError: there is no C compiler.
    """
    if hasattr(ctypes.CDLL(None), "disk_begin"):
        shutil.rmtree(Path(os.environ.pop("LD_PRELOAD")).parent)  # loaded; programs that the forks execute go without
        return
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or sys.platform != "linux":
        raise CannotError("needs Linux and a C compiler (on Debian and Ubuntu: apt-get install gcc)")
    library = Path(tempfile.mkdtemp(prefix="chaos-")) / "disk.so"
    command = [compiler, "-shared", "-fPIC", "-O1", str(_SOURCE), "-o", str(library), "-lpthread"]
    subprocess.run(command, check=True)
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, "-m", "tests.chaos", *sys.argv[1:]])


@dataclass(frozen=True, slots=True)
class Fault:
    """The nth operation of a kind fails.

    kind: write, fsync, rename, open (for writing), unlink, mkdir, truncate, read, or print (to standard output)
    error: an errno; 0 with `is_short`: nothing fails, but the operation ends after half of its bytes
    is_short: a write or read ends after half of its bytes, and the next one fails with `error`
    is_sticky: all later operations of the kind fail as well
    """

    kind: str
    nth: int
    error: int = 0
    is_short: bool = False
    is_sticky: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    code: int  # minus the signal of a killed program
    output: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation that was done. Paths are absolute."""

    kind: str  # create, truncate, write, fsync, rename, unlink, mkdir, mark, fault
    path: str
    second: str = ""  # of a rename
    offset: int = 0  # of a write; the new size of a truncate
    data: bytes = b""


def run(
    program: Callable[[], int], root: Path, *, log: Path, records: bool = False, fault: Fault | None = None
) -> Ended:
    """Fork, and run a program in the child. Paths in `root` are recorded in `log` or disturbed.

    Raises:
        TimeoutError: it did not end within LIMIT_S.
    """
    printed = log.with_suffix(".out")
    for path in (log, printed):
        path.unlink(missing_ok=True)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be_program(program, root, log, printed, records, fault)
    os.setpgid(pid, pid)
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found or time.monotonic() > began + LIMIT_S:
            break
        time.sleep(0.005)
    if not found:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise TimeoutError(f"{fault}: it still ran after {LIMIT_S:g} s:\n{printed.read_text()}")
    return Ended(os.waitstatus_to_exitcode(status), printed.read_text(), time.monotonic() - began)


def mark(text: str) -> None:
    """Record what the program has promised by now."""
    ctypes.CDLL(None).disk_mark(text.encode())


def _be_program(
    program: Callable[[], int], root: Path, log: Path, printed: Path, records: bool, fault: Fault | None
) -> None:
    """Never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if records or fault:
            kind, nth, error, is_short, is_sticky = (
                (fault.kind, fault.nth, fault.error, fault.is_short, fault.is_sticky) if fault else ("", 0, 0, 0, 0)
            )
            begin = ctypes.CDLL(None).disk_begin
            begin.argtypes = [ctypes.c_char_p, ctypes.c_char_p, *[ctypes.c_int]]
            begin.argtypes += [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
            if begin(str(root).encode(), str(log).encode(), records, kind.encode(), nth, error, is_short, is_sticky):
                raise RuntimeError("disk.c could not begin")
        try:
            code = program()
        except SystemExit as ended:  # of `exit_with`
            code = ended.code if isinstance(ended.code, int) else 1
        mark(f"exit {code}")
        if fault:
            os.write(2, b"disk: %d operations of this kind\n" % ctypes.CDLL(None).disk_seen())
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def read_log(path: Path) -> list[Operation]:
    """Return the recorded operations, in their order."""
    found: list[Operation] = []
    with path.open("rb") as file:
        while line := file.readline():
            kind, offset, length, name, second = line.decode(errors="surrogateescape").rstrip("\n").split("\t")
            found.append(Operation(kind, name, second, int(offset), file.read(int(length))))
    return found
