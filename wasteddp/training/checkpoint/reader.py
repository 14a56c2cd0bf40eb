"""Reads the checkpoints of a run, and verifies them by hash. The files hold no pickles.

    checkpoints/step-00001234/model.safetensors       one file for each state; keys without `module.` and `_orig_mod.`
                              optimizer.safetensors   keys "name:parameter name"
                              ema.safetensors         the moving average of the weights, with train.ema_decay
                              ranks.safetensors       each rank's BatchNorm statistics, with several ranks
                              progress.json           the position of the run, and its lineage
                              settings.yaml
                              complete.json           format version and the sha256 of each file above; written last
    checkpoints/.step-00001234.tmp/                   left by a kill; removed at the next start

`writer` writes them. The set of states is open: a state that is passed to the writer under a name is read back under
that name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load

from wasteddp.errors import CheckpointError
from wasteddp.files import read_regular
from wasteddp.settings import Data, Evaluate
from wasteddp.training.checkpoint.progress import Lineage, Progress, measure_of
from wasteddp.training.distributed.precision import NOTHING_KEPT, Kept

FORMAT = "wasteddp-checkpoint"
FORMAT_VERSION = 4  # 2: the lineage has block, window and train_split; 3: balance and teacher; 4: unmeasured
COMPLETE = "complete.json"
PROGRESS = "progress.json"
SETTINGS = "settings.yaml"
FOLDER = "checkpoints"  # in run.out
STATE_SUFFIX = ".safetensors"
_STEP = re.compile(r"step-([0-9]{1,18})")  # the name of a checkpoint

State = dict[str, torch.Tensor]
States = Mapping[str, Mapping[str, torch.Tensor]]  # by name, before the copy


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    progress: Progress
    states: dict[str, State]  # "model", "optimizer" and others
    settings_yaml: str
    sha256: str = ""  # of complete.json, which has those of all other files


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def listed(folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, without verifying them."""
    return sorted(path for path in folder.glob("step-*") if _STEP.fullmatch(path.name))


def starting_point(folder: Path, resume: str, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint to resume from; None to start at step 0.

    Args:
        folder: `runs/<name>/checkpoints`.
        resume: "auto", "never", or the path of a checkpoint or of a run.
        say: receives a line for each checkpoint that is skipped.

    Raises:
        CheckpointError: the requested checkpoint cannot be used, or "never" would overwrite checkpoints.
    """
    there = listed(folder)
    if resume == "auto":
        return newest(folder, say)
    if resume == "never":
        if there:
            raise CheckpointError(
                f"--resume never, and {folder} holds {len(there)} checkpoints, the newest of step {step_of(there[-1])}",
                "a new run would overwrite them",
                f"set run.out to a new folder, remove {folder.parent}, or use --resume auto to continue the run",
            )
        return None
    asked = _asked(Path(resume), say)
    if not there or asked.progress.step >= step_of(there[-1]):
        return asked
    if asked.path.resolve().parent == folder.resolve():
        raise CheckpointError(
            f"--resume {resume}, and {folder} holds {there[-1].name}, which is newer",
            "the folder would hold two histories of the run, and after a kill it would resume from the newer one",
            f"set run.out to a new folder, remove the checkpoints newer than {asked.path.name}, or use --resume auto",
        )
    say(f"{folder.parent} already continues {resume}: resuming from its own newest checkpoint")
    return newest(folder, say)


def _asked(path: Path, say: Callable[[str], None]) -> Checkpoint:
    """Return the checkpoint, or the newest intact one of a run's folder or of a folder of checkpoints."""
    for folder in (path / FOLDER, path):
        if found := newest(folder, say):
            return found
    return read(path)


def kept_choices(run: Path, resume: str) -> Kept:
    """Return what was chosen on the machine that started the run, from the checkpoint that will probably be used.

    The checkpoint is not verified here, because the processes have not joined yet: `starting_point` does that.
    """
    paths = [] if resume == "never" else listed(run / FOLDER)
    if resume not in ("never", "auto"):
        asked = [Path(resume), *listed(Path(resume)), *listed(Path(resume) / FOLDER)][-1]
        if not (paths and _step_in(paths[-1]) > _step_in(asked)):
            paths.append(asked)  # otherwise the run has already continued it
    for path in reversed(paths):
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            raw = json.loads(read_regular(path / PROGRESS))
            # not recorded until 2026-11: fp16 had a loss scale, and auto was bf16 otherwise
            return Kept(raw.get("precision") or ("fp16" if raw.get("scaler") else "bf16"), raw.get("compiles"))
    return NOTHING_KEPT


def _step_in(path: Path) -> int:
    """Return the step in the name of a checkpoint; 0 for any other name."""
    return int(match[1]) if (match := _STEP.fullmatch(path.name)) else 0


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest intact checkpoint, and report each damaged one that is skipped; None without checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    paths = listed(folder)
    for path in reversed(paths):
        try:
            return read(path)
        except CheckpointError as error:
            say(f"skipped {path}: {error.found}")
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} is intact",
            "the run would start again at step 0",
            f"restore one from a backup, set run.out to a new folder, or remove {folder}",
        )
    return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint and verify its files.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of another format.
    """
    try:
        proof = read_regular(path / COMPLETE)
        complete = json.loads(proof)
        if complete["format"] != FORMAT or complete["format_version"] not in _READERS:
            raise ValueError(
                f"its format is {complete['format']} {complete['format_version']}; "
                f"this wasteddp reads {FORMAT} {', '.join(map(str, _READERS))}"
            )
        sha256 = complete["sha256"]
        with ThreadPoolExecutor() as threads:  # hashing releases the GIL, and takes most of the time of a resume
            contents = dict(zip(sha256, threads.map(partial(_proved, path), sha256, sha256.values()), strict=True))
        raw, settings_yaml = json.loads(contents[PROGRESS]), contents[SETTINGS].decode()
        lineage = _READERS[complete["format_version"]](raw.pop("lineage"), settings_yaml)
        files = {Path(name): content for name, content in contents.items()}
        states = {file.stem: load(content) for file, content in files.items() if file.suffix == STATE_SUFFIX}
        if missing := {"model", "optimizer"} - states.keys():
            raise ValueError(f"it has no state of: {', '.join(sorted(missing))}")
        if "best_in" not in raw:  # not recorded until 2026-11
            tree = yaml.safe_load(settings_yaml) or {}
            data = Data.model_construct(**tree.get("data", {}))
            raw["best_in"] = measure_of(data, Evaluate.model_construct(**tree.get("evaluate", {})), lineage.manifest)
        progress = Progress(lineage=lineage, **raw)
        if _step_in(path) not in (0, progress.step):  # a checkpoint that was copied to an arbitrary name has step 0
            raise ValueError(f"its name says step {_step_in(path)}, and it holds step {progress.step}")
        return Checkpoint(path, progress, states, settings_yaml, hashlib.sha256(proof).hexdigest())
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
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} is not an intact checkpoint: {reason}",
            "its weights may not be those that were trained",
            "use another checkpoint, or --resume auto, which uses the newest intact one",
        ) from error


def _proved(folder: Path, name: str, sha256: str) -> bytes:
    """Return the content of a file, after its hash is verified."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not a plain file name")
    content = read_regular(folder / name)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has {len(content)} bytes with sha256 {found[:12]}, not {sha256[:12]}")
    return content


def _lineage_1(raw: dict[str, Any], settings_yaml: str) -> Lineage:
    """Format 1 (until 2026-11): of what determines the order, only the lanes were outside the settings."""
    data = yaml.safe_load(settings_yaml)["data"]
    return _lineage_2({**raw, **{name: data[name] for name in ("block", "window", "train_split")}}, settings_yaml)


def _lineage_2(raw: dict[str, Any], settings_yaml: str) -> Lineage:
    """Format 2 (until 2026-11): before data.balance and train.teacher existed."""
    return Lineage.from_json({**raw, "balance": 0.0, "teacher": ""})


def _lineage_3(raw: dict[str, Any], settings_yaml: str) -> Lineage:
    return Lineage.from_json(raw)


_READERS: dict[int, Callable[[dict[str, Any], str], Lineage]] = {
    1: _lineage_1,
    2: _lineage_2,
    3: _lineage_3,
    4: _lineage_3,
}
