"""Attempts with the launchers of users: a signal to the launcher, to its ranks, or to all of them.

As slow as real starts. The launcher and the ranks are found from outside only, in /proc.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from wasteddp.training.distributed.launcher import free_port

from .attempts import HangError
from .events import SIGNALS
from .harness import EVERY_STEPS, STEPS, LostError, Training, compare, training_in, undisturbed

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("program.py")
LIMIT_S = 180.0  # for an attempt and its remaining processes; two cores may be busy
_POLL_S = 0.01

LAUNCHERS = {"accelerate, one process": 1, "accelerate, two": 2, "torchrun, two": 2}
TARGETS = ("the launcher", "its process group, as Ctrl-C", "all ranks", "rank 0", "the last rank", "launcher and ranks")


@dataclass(frozen=True, slots=True)
class Shot:
    """One attempt with a launcher, and the signal that ends it.

    after_steps: steps of this attempt before the signal; 0: as soon as the processes exist, during the imports
    delay_s: delay after that
    """

    number: int
    launcher: str
    target: str
    signal: str
    after_steps: int
    delay_s: float

    @property
    def processes(self) -> int:
        return LAUNCHERS[self.launcher]

    @property
    def name(self) -> str:
        """The row of the shot in the table."""
        return f"{self.launcher}: {self.target}"

    @property
    def asks(self) -> bool:
        """Whether the run must save: it receives a signal, or the kernel reports the end of its launcher. Before the
        first step it may have no handler yet, and a second SIGINT, from the launcher, makes it exit immediately.
        """
        if self.after_steps == 0 or (self.signal == "SIGINT" and self.target == "launcher and ranks"):
            return False
        return self.signal != "SIGKILL" or self.target == "the launcher"


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended."""

    stopped: bool  # with the mark that it saved and can resume
    seconds: float  # from the signal until the launcher and all ranks had ended; 0 if no signal was sent


@dataclass(frozen=True, slots=True)
class Record:
    """A shot and its result."""

    shot: Shot
    ended: Ended
    training: int  # number of the training
    steps_lost: int
    finished: bool

    @property
    def outcome(self) -> str:
        """The result in words, for the table."""
        if self.finished:
            return "finished all the same"
        if self.ended.stopped:
            return "saved and stopped"
        return "killed" if self.shot.after_steps else "ended before it could save"


def deck(draws: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (target, signal); all pairs are equally frequent."""
    while True:
        pairs = list(product(TARGETS, SIGNALS))
        draws.shuffle(pairs)
        yield from pairs


def draw(draws: random.Random, number: int, launcher: str, pair: tuple[str, str], *, steps_left: int) -> Shot:
    """Draw a shot: one in six during the imports, the others within the next twelve steps, a quarter of a training."""
    after = 0 if draws.random() < 1 / 6 else draws.randint(1, max(1, min(12, steps_left)))
    delay_s = draws.uniform(0, 3) if after == 0 else draws.uniform(0, 0.1)
    return Shot(number, launcher, *pair, after, round(delay_s, 4))


def launched(shot: Shot, arguments: list[str], run: Path) -> Ended:
    """Start the program, send the signal, and wait until all its processes have ended.

    Raises:
        HangError: a process still runs after LIMIT_S.
    """
    mark = run / "RESUMABLE"
    mark.unlink(missing_ok=True)
    log = run.with_name(f"{run.name}.log")
    said_before = log.stat().st_size if log.exists() else 0
    sent_at = 0.0
    with (
        log.open("ab") as file,
        subprocess.Popen(
            [*_command(shot.launcher), str(PROGRAM), *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own process group, as in a shell
        ) as process,
    ):
        began = time.monotonic()
        while process.poll() is None or _ranks(run):
            if not sent_at and process.poll() is None and _num_steps_logged(log, said_before) >= shot.after_steps:
                sent_at = _send(shot, process.pid, run)
            if time.monotonic() - began > LIMIT_S:
                for pid in (*_ranks(run).values(), *([] if process.poll() is not None else [process.pid])):
                    _kill(pid, signal.SIGKILL)
                raise HangError(f"{shot} still ran after {LIMIT_S:g} s; its log is {log}")
            time.sleep(_POLL_S)
    return Ended(mark.exists(), time.monotonic() - sent_at if sent_at else 0.0)


def _command(launcher: str) -> list[str]:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if launcher.startswith("torchrun"):
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if LAUNCHERS[launcher] == 1:
        return accelerate
    two = ROOT / "launch" / "accelerate" / "cpu2.yaml"
    return [*accelerate, "--config_file", str(two), "--main_process_port", str(free_port())]


def _send(shot: Shot, launcher: int, run: Path) -> float:
    """Send the signal if all ranks exist. Return the time, or 0 if a rank is missing."""
    ranks, number = _ranks(run), signal.Signals[shot.signal]
    if len(ranks) < shot.processes:
        return 0.0
    time.sleep(shot.delay_s)
    pids = {
        "the launcher": [launcher],
        "all ranks": list(ranks.values()),
        "rank 0": [ranks[0]],
        "the last rank": [ranks[max(ranks)]],
        "launcher and ranks": [launcher, *ranks.values()],
    }
    at = time.monotonic()
    if shot.target in pids:
        for pid in pids[shot.target]:
            _kill(pid, number)
    else:
        with suppress(ProcessLookupError):
            os.killpg(launcher, number)
    return at


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(pid, number)


def _ranks(run: Path) -> dict[int, int]:
    """Return rank -> pid of the processes that train in `run`, without their launcher, whose arguments end with
    theirs."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):  # it ended meanwhile
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if f"run.out={run}" in words and str(PROGRAM) in words[1:3]:
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                rank = next((word[5:] for word in environment if word.startswith("RANK=")), "0")
                found[int(rank)] = int(folder.name)
    return found


def _num_steps_logged(log: Path, after: int) -> int:
    """Count the lines with a step since the start of the attempt: the log has the lines of all attempts."""
    with log.open("rb") as file:
        file.seek(after)
        return sum(line.startswith(b"step ") for line in file)


def disturb_launched(
    out: Path, shards: Path, *, events: int, seed: int, say: Callable[[str], None], until: Callable[[], bool]
) -> list[Record]:
    """Disturb trainings of `accelerate launch` with one process, of it and torchrun with two, and of any of them.

    Ends when all events are done or `until()`. The rest of each training runs without a launcher, and the training is
    compared with an undisturbed one.

    Raises:
        LostError, HangError: at the first failed check; its files stay in `out`.
    """
    draws, records, trainings = random.Random(seed), list[Record](), 0
    one, accelerate, torchrun = LAUNCHERS
    pairs = deck(draws)
    while len(records) < events and not until():
        launchers = ([accelerate, torchrun], [one], [one, accelerate, torchrun])[trainings % 3]
        numbers = {LAUNCHERS[name] for name in launchers}
        training = training_in(out / f"launched-{seed}-{trainings}", shards)
        before = len(records)
        while training.steps_done < STEPS and len(records) < events and not until():
            left = STEPS - training.newest
            shot = draw(draws, len(records), draws.choice(launchers), next(pairs), steps_left=left)
            records.append(_shoot(training, shot, trainings))
            if records[-1].finished:
                break
        processes = min(numbers)
        training.finish(processes)
        compare(training.run, undisturbed(out, shards, processes), same_processes=len(numbers) == 1)
        trainings += 1
        say(f"{training.run.name}: {len(records) - before} events, as undisturbed; {len(records)} of {events}")
        shutil.rmtree(training.run)
    return records


def _shoot(training: Training, shot: Shot, number: int) -> Record:
    """Run one attempt with its signal, and check the result."""
    ended = launched(shot, training.arguments, training.run)
    kept, done = training.newest_whole(), training.steps_done
    record = Record(shot, ended, number, max(0, done - kept), finished=kept == STEPS and not ended.stopped)
    if kept < training.newest:
        raise LostError(f"step {training.newest} was on the disk, and only {kept} is: {record}")
    if ended.stopped and record.steps_lost:
        raise LostError(f"it said that it had saved: {record}")
    if record.steps_lost > 2 * EVERY_STEPS:
        raise LostError(f"{record.steps_lost} steps lost, with a checkpoint each {EVERY_STEPS}: {record}")
    if shot.asks and not (ended.stopped or record.finished):
        raise LostError(f"a signal that asks ended it otherwise: {record}")
    training.check_model()
    training.newest = kept
    return record


def table(records: list[Record]) -> str:
    """Return a Markdown table with a row for each launcher and target."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.shot.name].append(record)
    lines = [
        "| signal to | signals | how the attempt ended | repeated steps: most | s until all had ended: median, most |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, group in sorted(groups.items()):
        signals, outcomes = (
            ", ".join(f"{count} {word}" for word, count in sorted(Counter(words).items()))
            for words in ([record.shot.signal for record in group], [record.outcome for record in group])
        )
        seconds = [record.ended.seconds for record in group if record.ended.seconds]
        waits = f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if seconds else "not sent"
        lines.append(f"| {name} | {signals} | {outcomes} | {max(r.steps_lost for r in group)} | {waits} |")
    return "\n".join(lines)
