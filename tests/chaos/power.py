"""Power cuts: a program is recorded once, and started again from what a disk may hold after a cut.

The cuts are before and after every fsync and rename, after every promise, and at the end. `unsynced.WAYS` names what a
cut leaves of that which was not synced. From each state the program must start, finish, and have the result of one that
was not disturbed; what it had promised before the cut must be in the state.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator

from . import disk
from .harness import LostError
from .programs import Program
from .results import Results
from .unsynced import WAYS, Disk

_SHARES = {"train": 0.5, "resume": 0.15, "shard": 0.2, "evaluate": 0.05, "average": 0.1}  # of the points


def cut_power(
    programs: dict[str, Program],
    results: Results,
    *,
    points: int,
    seed: int,
    say: Callable[[str], None],
    until: Callable[[], bool],
) -> None:
    """Start from `points` states, the same for the same seed. Points in `results` are passed over.

    Raises:
        LostError: at the first state from which something is lost; it stays in the program's folder, as `left`.
    """
    for name, program in programs.items():
        there = list(_points(record(program)))
        chosen = random.Random(f"{seed} {name}").sample(there, min(round(points * _SHARES[name]), len(there)))
        program.reset()
        program.finish()
        expected = program.result()
        for cut, way in sorted(chosen):
            if results.has(name, way, cut):
                continue
            if until():
                say("time is up")
                return
            try:
                start_after_cut(program, cut, way, seed=seed, expected=expected)
            except Exception as error:
                raise LostError(f"{name}, cut after {cut} operations, leaving {way!r}: {error}") from error
            results.add(name, way, cut, "as undisturbed")
        say(f"{name}: {len(chosen)} of {len(there)} points, none lost")


def record(program: Program) -> list[disk.Operation]:
    """Run a program once, and return its operations after checking that they explain all files."""
    program.reset()
    model = Disk(program.state)
    ended = program.run(records=True)
    if ended.code:
        raise LostError(f"{program.name}: the recorded run ended with {ended.code}:\n{ended.output}")
    program.log.rename(program.log.with_suffix(".recorded"))
    operations = disk.read_log(program.log.with_suffix(".recorded"))
    for operation in operations:
        model.do(operation)
    model.check()
    return operations


def _points(operations: list[disk.Operation]) -> Iterator[tuple[int, str]]:
    cuts = {len(operations)}
    for number, operation in enumerate(operations):
        if operation.kind in ("fsync", "rename"):
            cuts |= {number, number + 1}
        elif operation.kind == "mark":
            cuts.add(number + 1)
    yield from ((cut, way) for cut in sorted(cuts) for way in WAYS)


def start_after_cut(program: Program, cut: int, way: str, *, seed: int, expected: object) -> None:
    """Cut the power after `cut` operations of the recorded run, and start the program from what `way` leaves.

    Raises:
        LostError: something was lost.
    """
    operations = disk.read_log(program.log.with_suffix(".recorded"))[:cut]
    program.reset()
    model = Disk(program.state)
    for operation in operations:
        model.do(operation)
    model.write(program.state, way, random.Random(f"{seed} {cut} {way}"))
    left = program.folder / "left"  # to look at, if something is lost
    shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(program.state, left)
    program.promised([operation.path for operation in operations if operation.kind == "mark"])
    ended = program.finish()
    if "Traceback" in ended.output:
        raise LostError(f"a traceback:\n{ended.output}")
    if program.result() != expected:
        raise LostError(f"it ended as {program.result()}, undisturbed it is {expected}:\n{ended.output}")
