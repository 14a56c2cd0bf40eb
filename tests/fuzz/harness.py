"""Give damaged files to the program, each in a process of its own, and find what is neither read nor refused."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from wasteddp.errors import EXIT_FINISHED, EXIT_USER_ERROR, WastedError

from .mutations import damaged
from .target import Target

MAX_SECONDS = 20.0
MAX_BYTES = 3 << 29  # 1.5 GiB of address space more than the process has when it begins
MAX_FILE_BYTES = 1 << 30  # a larger file ends the process by SIGXFSZ
_TRACEBACK = b"Traceback (most recent call last)"


@dataclass
class Result:
    """Counts of inputs by target and of their ends, and what was found."""

    inputs: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def fuzz(
    targets: Sequence[Target], *, seed: int, num_inputs: int, until: float, keep: Path, work: Path, num_jobs: int = 1
) -> Result:
    """Try damaged files of all targets in turn. What is found is kept below `keep`, one folder for each kind of fault.

    The seed and an input's number determine its target and content: they are the same for any number of jobs.

    Args:
        until: the value of time.monotonic() at which no further input is begun.
        work: for the copies of files; in memory, such as below /dev/shm, this takes half of the time.
        num_jobs: processes that try inputs at the same time.
    """
    result = Result()
    with contextlib.ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work))) for _ in range(num_jobs)]
        numbers = [range(job, num_inputs, num_jobs) for job in range(num_jobs)]
        if num_jobs == 1:
            return _fuzz(targets, numbers[0], folders[0], seed=seed, until=until, keep=keep)
        jobs = [
            _start(lambda of=of, folder=folder: _fuzz(targets, of, folder, seed=seed, until=until, keep=keep))
            for of, folder in zip(numbers, folders, strict=True)
        ]
        for pid, pipe in jobs:
            with pipe:
                content = pipe.read()
            os.waitpid(pid, 0)
            if not content:
                raise RuntimeError(f"job {pid} ended without a result")
            part = json.loads(content)
            result.inputs += Counter(part["inputs"])
            result.ends += Counter(part["ends"])
            result.findings += part["findings"]
    return result


def _start(function: Callable[[], Result]) -> tuple[int, IO[bytes]]:
    """Call a function in a process of its own. Return its id, and a pipe with the result at its end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, os.fdopen(reading, "rb")
    try:
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(vars(function())).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _fuzz(
    targets: Sequence[Target], numbers: Iterable[int], work: Path, *, seed: int, until: float, keep: Path
) -> Result:
    result = Result()
    for number in numbers:
        if time.monotonic() > until:
            break
        target = targets[number % len(targets)]
        draw = random.Random(f"{seed} {number}")
        content = damaged((target.folder / target.file).read_bytes(), target.kind, draw)
        end, output = try_content(target, content, work)
        result.inputs[target.name] += 1
        result.ends[end] += 1
        if end not in ("read", "refused"):
            place = keep / re.sub(r"\W+", "-", f"{end}-{target.name}-{_where(output)}")[:120]
            with contextlib.suppress(FileExistsError):
                place.mkdir(parents=True)
                (place / f"input.{target.kind}").write_bytes(content)
                (place / "output.txt").write_bytes(output)
                result.findings.append(f"{place}: {end}, input {number} of seed {seed}")
    return result


def try_content(target: Target, content: bytes, work: Path) -> tuple[str, bytes]:
    """Return how a process that reads the content ends, and its output.

    The end is "read", "refused" (a message of the program), or a fault: "traceback", "hang", "memory", "silent" (exit
    code 2 without a message), "exit CODE", "signal NUMBER".
    """
    copy = work / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    for extra in work.glob("out*"):
        shutil.rmtree(extra, ignore_errors=True) if extra.is_dir() else extra.unlink()
    _copy_by_links(target.folder, copy)
    file = copy / target.file
    file.unlink()
    file.write_bytes(content)
    imported = work / "imported"
    with tempfile.TemporaryFile(dir=work) as output:
        gc.freeze()  # a collection in the child would copy the pages of all objects
        pid = os.fork()
        if not pid:
            _read(target, copy, output.fileno(), imported)  # does not return
        status = _wait(pid)
        output.seek(0)
        text = output.read()
    if imported.exists():
        _import(imported)
    if status is None:
        return "hang", text
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}", text
    code = os.WEXITSTATUS(status)
    if b"MemoryError" in text or b"DefaultCPUAllocator" in text:
        return "memory", text
    if _TRACEBACK in text:
        return "traceback", text
    if code == EXIT_USER_ERROR:
        return ("refused" if text.strip() else "silent"), text
    return ("read" if code in (EXIT_FINISHED, 1) else f"exit {code}"), text


def _import(names: Path) -> None:
    """Import what a child has imported, so that the next ones need not."""
    for name in names.read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    names.unlink()


def _copy_by_links(folder: Path, copy: Path) -> None:
    shutil.copytree(folder, copy, copy_function=os.link)


def _read(target: Target, copy: Path, output: int, imported: Path) -> None:
    """In the child: read, write the names of modules that were imported, and leave with an exit code."""
    code, known = 70, set(sys.modules)
    try:
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False, errors="backslashreplace"))
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (pages + MAX_BYTES, pages + MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, which would look like a full disk
        os.chdir(copy)
        try:
            code = target.read(copy) or EXIT_FINISHED
        except WastedError as error:
            print(error)
            code = EXIT_USER_ERROR
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else EXIT_USER_ERROR
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(Exception):
            if new := sys.modules.keys() - known:
                imported.write_text("\n".join(sorted(new)))
        os._exit(code)


def _wait(pid: int) -> int | None:
    """Return the status of the process, or None after it was killed for taking too long."""
    descriptor = os.pidfd_open(pid)
    try:
        ready, _, _ = select.select([descriptor], [], [], MAX_SECONDS)
    finally:
        os.close(descriptor)
    if not ready:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return status if ready else None


def _where(output: bytes) -> str:
    """Return the last file and line of the program in a traceback, or a hash of the output."""
    lines = re.findall(rb'File ".*?/(wasteddp/[^"]+)", line (\d+)', output)
    if lines:
        return b" ".join(lines[-1]).decode()
    return f"{zlib.crc32(output[-200:]):08x}"
