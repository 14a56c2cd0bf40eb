"""Faults at every call: the first, second, third ... write, fsync, rename, open or read of a program fails.

After each fault the program must end with 0, 2, 70 or 75, with a message and without a traceback. If it did not finish
with the result of a program that was not disturbed, the next start must.
"""

from __future__ import annotations

import errno
import functools
import os
import random
from collections.abc import Callable
from typing import Any

from wasteddp.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_RESUMABLE, EXIT_USER_ERROR

from . import disk
from .harness import LostError
from .programs import Program
from .results import Results

FAULTS: dict[str, dict[str, Any]] = {
    "write: EIO": {"kind": "write", "error": errno.EIO},
    "write: ENOSPC after half of the bytes": {"kind": "write", "error": errno.ENOSPC, "is_short": True},
    "write: ENOSPC, and at all later ones": {"kind": "write", "error": errno.ENOSPC, "is_sticky": True},
    "write: EINTR": {"kind": "write", "error": errno.EINTR},
    "write: half of the bytes": {"kind": "write", "is_short": True},
    "fsync: EIO": {"kind": "fsync", "error": errno.EIO},
    "fsync: EINTR": {"kind": "fsync", "error": errno.EINTR},
    "rename: EIO": {"kind": "rename", "error": errno.EIO},
    "open for writing: EIO": {"kind": "open", "error": errno.EIO},
    "open for writing: ENOSPC": {"kind": "open", "error": errno.ENOSPC},
    "open for writing: EINTR": {"kind": "open", "error": errno.EINTR},
    "mkdir: ENOSPC": {"kind": "mkdir", "error": errno.ENOSPC},
    "unlink: EIO": {"kind": "unlink", "error": errno.EIO},
    "truncate: EIO": {"kind": "truncate", "error": errno.EIO},
    "print: ENOSPC": {"kind": "print", "error": errno.ENOSPC},
    "print: ENOSPC, and at all later ones": {"kind": "print", "error": errno.ENOSPC, "is_sticky": True},
    "read: EIO": {"kind": "read", "error": errno.EIO},
    "read: EINTR": {"kind": "read", "error": errno.EINTR},
    "read: half of the bytes": {"kind": "read", "is_short": True},
}
_CODES = {
    EXIT_FINISHED: "finished all the same",
    EXIT_USER_ERROR: "a message (2)",
    EXIT_FAILED: "a message (70)",
    EXIT_RESUMABLE: "saved and stopped (75)",
}


def fail_every_nth(
    programs: dict[str, Program],
    results: Results,
    *,
    say: Callable[[str], None],
    until: Callable[[], bool],
    share: float = 1.0,
    seed: int = 0,
) -> None:
    """Let every call fail, one after the other, and start again after each. Faults in `results` are passed over.

    Args:
        share: the fraction of all faults to test, drawn with `seed`.

    Raises:
        LostError: at the first fault that does more than it may.
    """
    draws = random.Random(seed)
    for name, program in programs.items():
        program.reset()
        program.finish()
        expected = program.result()
        for words, how in FAULTS.items():
            for nth in range(1, _number_of(program, how["kind"]) + 1):
                if draws.random() >= share or results.has(name, words, nth):
                    continue
                if until():
                    say("time is up")
                    return
                results.add(name, words, nth, fail(program, disk.Fault(nth=nth, **how), expected))
            say(f"{name}, {words}: {dict(results.counts(words, name))}")


@functools.cache
def _number_of(program: Program, kind: str) -> int:
    """Return how many operations of a kind an undisturbed run has."""
    program.reset()
    output = program.run(fault=disk.Fault(kind, nth=1 << 30)).output
    return int(output.rsplit("disk: ", 1)[1].split()[0])


def fail(program: Program, fault: disk.Fault, expected: dict[str, Any]) -> str:
    """Run with a fault, check how it ended, start again, and compare. Return how it ended.

    Raises:
        LostError: with the fault and the output.
    """
    program.reset()
    ended = program.run(fault=fault)
    hit = next((one.path for one in disk.read_log(program.log) if one.kind == "fault"), "")
    if not hit:
        return "no such call this time"  # the threads of a training may do one more or less
    problem = _problem(program, fault, ended)
    if not problem and not (ended.code == EXIT_FINISHED and program.is_left_as(expected)):
        try:
            program.finish()
            if program.result() != expected:
                problem = f"the next start ended as {program.result()}, undisturbed it is {expected}"
        except LostError as error:
            problem = f"the next start: {error}"
    if problem:
        raise LostError(f"{program.name}, {fault} at {hit}: {problem}\nits output:\n{ended.output}")
    return _CODES[ended.code]


def _problem(program: Program, fault: disk.Fault, ended: disk.Ended) -> str:
    if ended.code not in _CODES:
        return f"it ended with {ended.code}"
    if "Traceback" in ended.output:
        return "a traceback"
    reason = os.strerror(fault.error)
    if ended.code == EXIT_FINISHED:
        try:
            program.promised(["exit 0"])
        except Exception as error:
            return "" if reason in ended.output else f"it said that it had finished, and nothing else; {error}"
    elif not fault.error or fault.error == errno.EINTR:
        return "a call that had to be repeated ended the program"
    elif reason not in ended.output:
        return f"its message does not say {reason!r}"
    return ""
