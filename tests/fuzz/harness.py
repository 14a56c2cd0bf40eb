"""Give damaged files to the program, each in a process of its own, and find what is neither read nor refused."""

from __future__ import annotations

import contextlib
import gc
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wasteddp.errors import EXIT_FINISHED, EXIT_USER_ERROR, WastedError

from .mutations import damaged
from .targets import Target

MAX_SECONDS = 20.0
MAX_BYTES = 3 << 29  # 1.5 GiB of address space more than the process has when it begins
_TRACEBACK = b"Traceback (most recent call last)"


@dataclass
class Result:
    """Counts of inputs by target and of their ends, and what was found."""

    inputs: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def fuzz(targets: Sequence[Target], *, seed: int, num_inputs: int, until: float, keep: Path) -> Result:
    """Try damaged files of all targets in turn. What is found is kept below `keep`, one folder for each kind of fault.

    Args:
        until: the value of time.monotonic() at which no further input is begun.
    """
    result = Result()
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        for number in range(num_inputs):
            if time.monotonic() > until:
                break
            target = targets[number % len(targets)]
            draw = random.Random(f"{seed} {number}")
            content = damaged((target.folder / target.file).read_bytes(), target.kind, draw)
            end, output = try_content(target, content, Path(work))
            result.inputs[target.name] += 1
            result.ends[end] += 1
            if end not in ("read", "refused"):
                place = keep / re.sub(r"\W+", "-", f"{end}-{target.name}-{_where(output)}")[:120]
                if not place.exists():
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
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if not pid:
            _read(target, copy, output.fileno())  # does not return
        status = _wait(pid)
        output.seek(0)
        text = output.read()
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


def _copy_by_links(folder: Path, copy: Path) -> None:
    shutil.copytree(folder, copy, copy_function=os.link)


def _read(target: Target, copy: Path, output: int) -> None:
    """In the child: read, and leave with an exit code."""
    code = 70
    try:
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False, errors="backslashreplace"))
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (pages + MAX_BYTES, pages + MAX_BYTES))
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
