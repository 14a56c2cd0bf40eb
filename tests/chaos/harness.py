"""Trainings that are disturbed until they end, and the checks after every disturbance."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from wasteddp.errors import EXIT_RESUMABLE, EXIT_USER_ERROR
from wasteddp.inference.bundle import load_bundle
from wasteddp.training.checkpoint import reader as checkpoints

from .attempts import HangError, Outcome, attempt
from .events import Event, draw

# 100 images, 8 steps per epoch: after its start, a training of 6 epochs takes about a second
STEPS_PER_EPOCH, EPOCHS, EVERY_STEPS = 8, 6, 3
SETTINGS = f"""
precision: fp32
run: {{threads: 1, record_steps: true}}
data: {{image_size: 32}}
model: {{arch: resnet18, weights: none}}
train: {{epochs: {EPOCHS}, batch_size: 12, max_micro_batch: 6, log_every_steps: 1}}
evaluate: {{batch_size: 8}}
optimizer: {{lr: 0.05}}
checkpoint: {{every_steps: {EVERY_STEPS}}}
track: {{wandb: disabled}}
"""
STEPS = STEPS_PER_EPOCH * EPOCHS
_MAX_EVENTS_PER_TRAINING = 30


class LostError(Exception):
    """A guarantee did not hold."""


@dataclass(frozen=True, slots=True)
class Record:
    """An event and its result."""

    event: Event
    outcome: Outcome
    steps_before: int  # recorded when the attempt ended
    steps_kept: int  # step of the newest intact checkpoint afterwards

    @property
    def steps_lost(self) -> int:
        return max(0, self.steps_before - self.steps_kept)

    @property
    def ended(self) -> str:
        """The result in words, for the table."""
        codes = set(self.outcome.codes)
        if self.outcome.finished:
            return "finished all the same"
        if self.outcome.stopped:
            return "saved and stopped (75)"
        if codes <= {EXIT_USER_ERROR, 1} and EXIT_USER_ERROR in codes:
            return "ended with a message (2)"
        return "killed" if -signal.SIGKILL in codes else f"ended otherwise {sorted(codes)}"


@dataclass(slots=True)
class Training:
    """One disturbed training and its state."""

    run: Path
    arguments: list[str]
    newest: int = 0  # step of the newest checkpoint that was found whole
    had_model: bool = False
    records: list[Record] = field(default_factory=list)

    @property
    def steps_done(self) -> int:
        return len(steps_of(self.run))

    def disturb(self, event: Event) -> Record:
        """Run one attempt with its event, and check the result.

        Raises:
            LostError, HangError: with the event.
        """
        allowed = self.newest
        if event.kind == "flip":
            allowed = self._flip_a_bit(event)
        outcome = attempt(self.arguments, self.run, event, event.processes)
        kept = self.newest_whole()
        record = Record(event, outcome, self.steps_done, kept)
        self.records.append(record)
        if kept < allowed:
            raise LostError(f"step {allowed} was on the disk, and only {kept} is: {record}")
        if outcome.stopped and record.steps_lost:
            raise LostError(f"it said that it had saved: {record}")
        if event.kind in ("signal", "flip", "save", "epoch") and record.steps_lost > 2 * EVERY_STEPS:
            raise LostError(f"{record.steps_lost} steps lost, with a checkpoint each {EVERY_STEPS}: {record}")
        graceful = event.kind in ("signal", "epoch") and event.signal != "SIGKILL"
        if graceful and not (set(outcome.codes) <= {0, EXIT_RESUMABLE}):
            raise LostError(f"a signal that asks ended it otherwise: {record}")
        self.check_model()
        self.newest = kept
        return record

    def finish(self, processes: int) -> None:
        """Run the last attempt, undisturbed."""
        outcome = attempt(self.arguments, self.run, None, processes)
        if not outcome.finished:
            raise LostError(f"the undisturbed attempt at the end did not finish: {outcome}")

    def _flip_a_bit(self, event: Event) -> int:
        """Change a bit of the newest checkpoint on the disk. Return the step that must still be kept."""
        there = checkpoints.listed(self.run / "checkpoints")
        if len(there) < 2 or checkpoints.step_of(there[-1]) != self.newest:
            return self.newest
        path = there[-1] / random.Random(event.number).choice(["model.safetensors", "optimizer.safetensors"])
        content = bytearray(path.read_bytes())
        content[-1 - event.number % len(content)] ^= 1 << event.number % 8
        path.write_bytes(content)
        return self.newest_whole()

    def newest_whole(self) -> int:
        """Return the step of the newest checkpoint with correct hashes; 0 without one."""
        folder = self.run / "checkpoints"
        if not checkpoints.listed(folder):
            return 0
        found = checkpoints.newest(folder, lambda line: None)
        return found.progress.step if found else 0

    def check_model(self) -> None:
        """Raise if the model is damaged or has disappeared."""
        if (self.run / "model" / "model.json").exists():
            load_bundle(self.run)
            self.had_model = True
        elif self.had_model:
            raise LostError(f"the model in {self.run} is gone")


def steps_of(run: Path) -> list[dict[str, str]]:
    path = run / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final_state(run: Path) -> dict[str, str]:
    """Return the sha256 of each tensor file of the last checkpoint, and of the best model's weights."""
    last = checkpoints.listed(run / "checkpoints")[-1]
    sha256: dict[str, str] = json.loads((last / "complete.json").read_text())["sha256"]
    files = {name: value for name, value in sha256.items() if name.endswith(".safetensors")}
    return {"step": last.name, "best": load_bundle(run)[0].hashes.weights or "", **files}


def compare(run: Path, undisturbed: Path, *, same_processes: bool) -> None:
    """Raise a LostError if a disturbed run differs from the undisturbed one."""
    ours, theirs = steps_of(run), steps_of(undisturbed)
    if [row["step"] for row in ours] != list(range(1, STEPS + 1)):
        raise LostError(f"{run} recorded the steps {[row['step'] for row in ours]}")
    names = ("samples", "images", "weights") if same_processes else ("samples", "images")
    for mine, wanted in zip(ours, theirs, strict=True):
        different = [name for name in names if mine[name] != wanted[name]]
        if different:
            raise LostError(f"{run}: other {different} in step {mine['step']}")
    if same_processes and final_state(run) != final_state(undisturbed):
        raise LostError(f"{run} ended as {final_state(run)}, undisturbed it is {final_state(undisturbed)}")
    losses = [[row.get("train/loss") for row in _metrics(path)] for path in (run, undisturbed)]
    if len(losses[0]) != STEPS or (same_processes and losses[0] != losses[1]):
        raise LostError(f"{run} has other losses in metrics.jsonl")


def _metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training_in(run: Path, shards: Path) -> Training:
    """Return a training that has not started."""
    config = run.with_name("config.yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(SETTINGS)
    return Training(run, ["--config", str(config), "--set", f"data.shards={shards}", "--set", f"run.out={run}"])


def undisturbed(out: Path, shards: Path, processes: int) -> Path:
    """Return the run to compare with, which is trained once."""
    training = training_in(out / f"undisturbed-{processes}", shards)
    if not training.run.exists():
        training.finish(processes)
    return training.run


def disturb_many(
    out: Path,
    shards: Path,
    *,
    events: int,
    seed: int,
    say: Callable[[str], None],
    until: Callable[[], bool],
    only: str = "",
) -> list[Training]:
    """Disturb trainings at one process, at two, and at one or two in turn, until all events are done or `until()`.

    `only`: kind of the events.

    Raises:
        LostError, HangError: at the first thing that does not hold; what it left stays in `out`.
    """
    draws, done, trainings = random.Random(seed), 0, []
    while done < events and not until():
        mode = (1, 2, 0)[len(trainings) % 3]  # 0: one or two at each start
        training = training_in(out / f"disturbed-{seed}-{len(trainings)}", shards)
        trainings.append(training)
        while training.steps_done < STEPS and done < events and len(training.records) < _MAX_EVENTS_PER_TRAINING:
            event = draw(draws, done, mode or draws.choice([1, 2]), only)
            try:
                record = training.disturb(event)
            except HangError as error:
                raise LostError(f"seed {seed}: {error}") from error
            done += 1
            if record.outcome.finished or until():
                break
        training.finish(mode or 1)
        compare(training.run, undisturbed(out, shards, mode or 1), same_processes=bool(mode))
        say(f"{training.run.name}: {len(training.records)} events, as undisturbed; {done} of {events}")
        shutil.rmtree(training.run)
    return trainings
