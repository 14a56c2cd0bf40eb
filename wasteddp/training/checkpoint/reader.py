"""A run's state on disk: whole, checked by hash before it is trusted, without a pickle.

    checkpoints/step-00001234/model.safetensors       a file for each state, with inner keys: no `module.`, `_orig_mod.`
                              optimizer.safetensors   "key:parameter name"
                              ema.safetensors         the weights' moving average, where train.ema_decay asks for it
                              ranks.safetensors       what each rank has of its own; only where there are several
                              progress.json           where the run is, and what it was made from
                              settings.yaml
                              complete.json           format version and the sha256 of each file above; written last
    checkpoints/.step-00001234.tmp/                   what a kill leaves; removed at the next start

This module reads; `writer` writes. The set of states is open: whatever is given to the writer under a
name comes back under that name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load

from wasteddp.errors import CheckpointError
from wasteddp.files import read_regular
from wasteddp.training.checkpoint.compatibility import Lineage, changes_of_order, measure_of_settings
from wasteddp.training.distributed.precision import NOTHING_KEPT, Kept

FORMAT = "wasteddp-checkpoint"
FORMAT_VERSION = 4  # 2: the lineage has block, window and train_split; 3: balance and teacher; 4: unmeasured
COMPLETE = "complete.json"
PROGRESS = "progress.json"
SETTINGS = "settings.yaml"
FOLDER = "checkpoints"  # in run.out
STATE_SUFFIX = ".safetensors"

State = dict[str, torch.Tensor]
States = Mapping[str, Mapping[str, torch.Tensor]]  # by name, before they are copied


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. The place in the stream is `step` alone: the epoch follows from the plan."""

    lineage: Lineage
    step: int = 0  # optimizer steps done
    best_value: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    damaged: int = 0  # training samples replaced so far
    covered: list[int] = field(default_factory=list)  # of the epoch: see training.coverage_proof; empty: not counted
    attempt: int = 1  # starts of this run, this one included
    tracker_id: str = ""
    scaler: dict[str, float] | None = None  # of fp16's GradScaler
    skipped: int = 0  # steps without an update so far, because they diverged
    skipped_in_a_row: int = 0
    rollbacks: int = 0  # times that the run went back because it diverged
    lr_factor: float = 1.0  # what they have made of the learning rate
    unmeasured: dict[str, float] | None = None  # the step's metrics, where its evaluation did not come to its end
    precision: str = ""  # that it was computed in
    compiles: bool | None = None  # whether the network was compiled
    micro_batch: int = 0  # that the run began with, where train.max_micro_batch left it open; 0: it did not
    best_in: str = ""  # what `best_value` was measured in: see `compatibility.measure_of`; "": see the settings
    changed: list[str] = field(default_factory=list)  # of the order, accepted within the epoch: it cannot be proved

    def stopped_early(self, patience: int) -> bool:
        """Whether `patience` evaluations have passed without a better one; 0 is endless patience."""
        return 0 < patience <= self.evaluations_since_best

    def with_evaluation(self, value: float) -> Progress:
        """The best so far; a value that is no number is never better than another."""
        if isfinite(value) and (self.best_value is None or value > self.best_value):
            return replace(self, best_value=value, best_step=self.step, evaluations_since_best=0)
        return replace(self, evaluations_since_best=self.evaluations_since_best + 1)

    @property
    def best_metric(self) -> dict[str, float]:
        """As a row of metrics; empty before the first evaluation, and 0.0 is a value like others."""
        return {} if self.best_value is None else {"best/value": self.best_value}

    @property
    def counts(self) -> dict[str, float]:
        """What has happened to the run so far, as a row of metrics."""
        return {
            "train/damaged": self.damaged,
            "train/skipped": self.skipped,
            "train/rollbacks": self.rollbacks,
            "attempt": self.attempt,
        }

    def started_again(self, lineage: Lineage, measure: str) -> Progress:
        """The next attempt, with the changes that were accepted.

        A change of the order ends the count of the epoch: its first steps followed another order. A change of what the
        best model is measured in ends the comparison with the best so far.

        Args:
            lineage: of this start.
            measure: `compatibility.measure_of` this start.
        """
        changed = changes_of_order(self.lineage, lineage)
        again = replace(self, lineage=lineage, attempt=self.attempt + 1, best_in=measure)
        if changed:
            again = replace(again, covered=[], changed=sorted({*self.changed, *changed}))
        if self.best_in != measure:
            again = replace(again, best_value=None, best_step=0, evaluations_since_best=0)
        return again


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was read, and whose bytes are those that were written."""

    path: Path
    progress: Progress
    states: dict[str, State]  # "model", "optimizer" and whatever else the run kept
    settings_yaml: str


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def listed(folder: Path) -> list[Path]:
    """Checkpoints of a run, the oldest first, whole or not."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())


def starting_point(folder: Path, resume: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from; None to begin at the beginning.

    Args:
        folder: `runs/<name>/checkpoints`.
        resume: "auto", "never", or the path of a checkpoint or of a run.
        say: takes a line for each checkpoint that is passed over.

    Raises:
        CheckpointError: what was asked for cannot be had.
    """
    there = listed(folder)
    if resume == "auto":
        return newest(folder, say)
    if resume == "never":
        if there:
            raise CheckpointError(
                f"--resume never, and {folder} holds {len(there)} checkpoints, the newest of step {step_of(there[-1])}",
                "a new run would overwrite them one by one",
                f"set run.out to a new folder, or remove {folder.parent} yourself, or use --resume auto to go on",
            )
        return None
    asked = _asked(Path(resume), say)
    if not there or asked.progress.step >= step_of(there[-1]):
        return asked
    if asked.path.resolve().parent == folder.resolve():
        raise CheckpointError(
            f"--resume {resume}, and {folder} holds {there[-1].name}, which is newer",
            "two lines of one run would lie in one folder, and after a kill the newer one would be gone on with",
            f"set run.out to a new folder, or remove what is newer than {asked.path.name}, or use --resume auto",
        )
    say(f"{folder.parent} has gone on from {resume} already, so it goes on from its own newest checkpoint")
    return newest(folder, say)


def _asked(path: Path, say: Callable[[str], None]) -> Checkpoint:
    """A checkpoint, or the newest whole one of a run's folder or of its folder of checkpoints."""
    for folder in (path / FOLDER, path):
        if found := newest(folder, say):
            return found
    return read(path)


def kept_choices(run: Path, resume: str) -> Kept:
    """What was chosen on the machine that began the run, from the checkpoint that a start will probably go on from.

    It is not checked here, since the processes have not met: `starting_point` is what proves it and reports.
    """
    paths = [] if resume == "never" else listed(run / FOLDER)
    if resume not in ("never", "auto"):
        asked = [Path(resume), *listed(Path(resume)), *listed(Path(resume) / FOLDER)][-1]
        if not (paths and _step_in(paths[-1]) > _step_in(asked)):
            paths.append(asked)  # else the run has gone on from there already
    for path in reversed(paths):
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            raw = json.loads(read_regular(path / PROGRESS))
            # until 2026-11 it was not written down: fp16 had a loss scale, and auto was bf16 otherwise
            return Kept(raw.get("precision") or ("fp16" if raw.get("scaler") else "bf16"), raw.get("compiles"))
    return NOTHING_KEPT


def _step_in(path: Path) -> int:
    """The step of a checkpoint, as its name says; 0 for another name."""
    return int(step) if (step := path.name.removeprefix("step-")).isdigit() else 0


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; each that is not is named and passed over. None where there is none.

    Raises:
        CheckpointError: there are checkpoints and none of them is whole.
    """
    paths = listed(folder)
    for path in reversed(paths):
        try:
            return read(path)
        except CheckpointError as error:
            say(f"passed over {path}: {error.found}")
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} is whole",
            "the run would start from the beginning as if nothing had been",
            f"restore one from a backup, or set run.out to a new folder, or remove {folder}",
        )
    return None


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint and proves its bytes.

    Raises:
        CheckpointError: not there, not whole, or of another format.
    """
    try:
        complete = json.loads(read_regular(path / COMPLETE))
        if complete["format"] != FORMAT or complete["format_version"] not in _READERS:
            raise ValueError(
                f"its format is {complete['format']} {complete['format_version']}; "
                f"this wasteddp reads {FORMAT} {', '.join(map(str, _READERS))}"
            )
        sha256 = complete["sha256"]
        with ThreadPoolExecutor() as threads:  # hashing lets go of the GIL, and is most of the time that a resume takes
            contents = dict(zip(sha256, threads.map(partial(_proved, path), sha256, sha256.values()), strict=True))
        raw, settings_yaml = json.loads(contents[PROGRESS]), contents[SETTINGS].decode()
        lineage = _READERS[complete["format_version"]](raw.pop("lineage"), settings_yaml)
        files = {Path(name): content for name, content in contents.items()}
        states = {file.stem: load(content) for file, content in files.items() if file.suffix == STATE_SUFFIX}
        if missing := {"model", "optimizer"} - states.keys():
            raise ValueError(f"it has no state of: {', '.join(sorted(missing))}")
        raw.setdefault("best_in", measure_of_settings(yaml.safe_load(settings_yaml), lineage.manifest))  # until 2026-11
        return Checkpoint(path, Progress(lineage=lineage, **raw), states, settings_yaml)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
        yaml.YAMLError,
    ) as error:
        reason = f"{error.args[0]!r} is missing in it" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} is not a whole checkpoint: {reason}",
            "the weights in it may not be those that were trained",
            "use another one, or --resume auto, which takes the newest that is whole",
        ) from error


def _proved(folder: Path, name: str, sha256: str) -> bytes:
    """A file's content, if its hash is the one that was written down."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not a plain file name")
    content = read_regular(folder / name)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has {len(content)} bytes with sha256 {found[:12]}, not {sha256[:12]}")
    return content


def _lineage_1(raw: dict[str, Any], settings_yaml: str) -> Lineage:
    """Format 1 (until 2026-11): what the order hangs on, beside the lanes, was in the settings only."""
    data = yaml.safe_load(settings_yaml)["data"]
    return _lineage_2({**raw, **{name: data[name] for name in ("block", "window", "train_split")}}, settings_yaml)


def _lineage_2(raw: dict[str, Any], settings_yaml: str) -> Lineage:
    """Format 2 (until 2026-11): every image was drawn once in an epoch, and nobody taught."""
    return Lineage.from_json({**raw, "balance": 0.0, "teacher": ""})


def _lineage_3(raw: dict[str, Any], settings_yaml: str) -> Lineage:
    return Lineage.from_json(raw)


_READERS: dict[int, Callable[[dict[str, Any], str], Lineage]] = {
    1: _lineage_1,
    2: _lineage_2,
    3: _lineage_3,
    4: _lineage_3,
}
