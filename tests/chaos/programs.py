"""The programs whose disks fail: a short training, a training that resumes, a sharding, an evaluation and an average.

Each has a folder `state` of its own, whose content before and after is compared, and reads images and shards beside it:

    out/disk/images/  shards/  config.yaml     the inputs
    out/disk/<name>/state/                     what the program writes
    out/disk/<name>/before/                    its content before the program starts
    out/<name>.log  .out                       its operations, and what it printed
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import narrow
from wasteddp import cli, train
from wasteddp.data.manifest import MANIFEST_NAME, Manifest
from wasteddp.errors import WastedError
from wasteddp.inference.bundle import load_bundle
from wasteddp.sharding import verify
from wasteddp.sharding.build import Job, Options, check_files, make_shards
from wasteddp.sharding.sources import synthetic
from wasteddp.training import run_folder
from wasteddp.training.checkpoint import reader, writer

from . import disk
from .harness import LostError, final_state

NAMES = ("train", "resume", "shard", "evaluate", "average")
STEPS, EVERY_STEPS = 6, 2
_SETTINGS = f"""
precision: fp32
run: {{threads: 1}}
data: {{image_size: 32}}
model: {{arch: resnet18, weights: none}}
train: {{epochs: 2, batch_size: 12, max_micro_batch: 6, log_every_steps: 1}}
evaluate: {{batch_size: 8}}
optimizer: {{lr: 0.05}}
checkpoint: {{every_steps: {EVERY_STEPS}}}
track: {{wandb: disabled}}
"""


@dataclass(frozen=True, slots=True)
class Program:
    """One program.

    start: runs it, in the child process
    promised: raises a LostError if a state lacks what the program had promised; receives its marks so far
    result: what two finished states must have in common
    """

    name: str
    words: str  # for the table
    folder: Path
    start: Callable[[], int]
    promised: Callable[[list[str]], None]
    result: Callable[[], dict[str, Any]]

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def log(self) -> Path:
        return self.folder.parent.with_name(f"{self.name}.log")

    def reset(self) -> None:
        """Restore the content of `state` before the program started."""
        shutil.rmtree(self.state, ignore_errors=True)
        shutil.copytree(self.folder / "before", self.state)

    def run(self, *, records: bool = False, fault: disk.Fault | None = None) -> disk.Ended:
        # a fault may hit the inputs too; only the state is recorded
        root = self.state if records else self.folder.parent
        return disk.run(self.start, root, log=self.log, records=records, fault=fault)

    def is_left_as(self, expected: dict[str, Any]) -> bool:
        """Whether the state is complete, with the result of an undisturbed start and no temporary files."""
        try:
            return self.result() == expected and not any(self.state.rglob("*.tmp"))
        except (OSError, ValueError, IndexError, WastedError):
            return False

    def finish(self) -> disk.Ended:
        """Run it undisturbed, and check that it leaves nothing unfinished.

        Raises:
            LostError: it did not finish, or left temporary files.
        """
        ended = self.run()
        if ended.code:
            raise LostError(f"{self.name}: the undisturbed start ended with {ended.code}:\n{ended.output}")
        if left := [str(path) for path in self.state.rglob("*.tmp")]:
            raise LostError(f"{self.name}: the next start did not remove {left}")
        return ended


def make_programs(out: Path) -> dict[str, Program]:
    """Draw the inputs, and return the programs, each ready to start."""
    out = out.resolve() / "disk"
    run_folder.write_report_within = lambda limit_s, run: "report: left out in tests"
    narrow.install()
    _mark_saves()
    _draw_inputs(out)
    training = _training(out, "train", "a training of 6 steps with 3 checkpoints")
    sharding = _sharding(out)
    (out / "train" / "before").mkdir(parents=True, exist_ok=True)
    (out / "shard" / "before").mkdir(parents=True, exist_ok=True)
    finished = out / "finished"
    if not finished.exists():
        training.reset()
        training.finish()
        shutil.copytree(training.state, finished)
    half = out / "resume" / "before"
    if not half.exists():  # a run that was killed in the middle of its second save
        shutil.copytree(finished, half)
        checkpoints = half / "run" / reader.FOLDER
        for path in reader.listed(checkpoints)[1:]:
            shutil.rmtree(path)
        (checkpoints / ".step-00000004.tmp").mkdir()
        names = "settings.yaml", "metrics.jsonl", "model/model-0.safetensors", "evaluations/val/metrics.json"
        for name in ("checkpoints/.step-00000004.tmp/model.safetensors", *(f"{name}.tmp" for name in names)):
            (half / "run" / name).write_bytes(b"half")
        tracking = half / "run" / "tracking.json"
        tracking.write_text(json.dumps(json.loads(tracking.read_text()) | {"exit_code": None}))
    programs = [training, sharding, _training(out, "resume", "a training that resumes at step 3")]
    for name, words, where in (
        ("evaluate", "an evaluation", "evaluations/test"),
        ("average", "an average of two checkpoints", "average"),
    ):
        before = out / name / "before"
        if not before.exists():
            shutil.copytree(finished, before)
        programs.append(_of_model(out, name, words, where))
    return {program.name: program for program in programs}


def _mark_saves() -> None:
    real = writer.CheckpointWriter._write

    def write(self: Any, progress: reader.Progress, *rest: Any) -> None:
        real(self, progress, *rest)
        disk.mark(f"saved {progress.step} {progress.best_step}")

    writer.CheckpointWriter._write = write  # type: ignore[method-assign]


def _draw_inputs(out: Path) -> None:
    if (out / "shards" / MANIFEST_NAME).exists():
        return
    for split, count, seed in (("train", 12, 1), ("val", 3, 2), ("test", 3, 3)):
        folder = out / "images" / split
        synthetic.draw_folder(folder, kinds=synthetic.KINDS[:3], images_per_class=count, size_px=48, seed=seed)
    make_shards(Job(out / "images", out / "shards", Options(shard_mb=0.05)), workers=1)
    (out / "config.yaml").write_text(_SETTINGS)


def _training(out: Path, name: str, words: str) -> Program:
    run = out / name / "state" / "run"
    arguments = ["--config", str(out / "config.yaml"), "--set", f"data.shards={out / 'shards'}"]
    arguments += ["--set", f"run.out={run}"]

    def promised(marks: list[str]) -> None:
        saved = [mark.split() for mark in marks if mark.startswith("saved")]
        if saved:
            check_run(run, step=int(saved[-1][1]), best_step=int(saved[-1][2]))
        if "exit 0" in marks:
            check_run(run, step=STEPS, best_step=0)

    def result() -> dict[str, Any]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        named = ("step", "epoch", "lr", "train/loss", "val/loss", "val/macro_f1", "best/value", "coverage/ok")
        return final_state(run) | {"rows": [[row.get(name) for name in named] for row in rows]}

    return Program(name, words, out / name, lambda: train.main(arguments), promised, result)


def check_run(run: Path, *, step: int, best_step: int) -> None:
    """Raise a LostError unless the run has an intact checkpoint of `step` or later, all rows before it, its model."""
    folder = run / reader.FOLDER
    found = reader.newest(folder, lambda line: None) if reader.listed(folder) else None
    if found is None or found.progress.step < step:
        raise LostError(f"step {step} was saved, and the newest intact checkpoint has {found and found.progress.step}")
    lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines() if step else []
    rows = [row for line in lines if (row := _row(line)) is not None]
    if missing := set(range(1, step + 1)) - set(rows):
        raise LostError(f"step {step} was saved, and metrics.jsonl lacks the rows of {sorted(missing)}")
    if best_step and load_bundle(run)[0].trained.step < best_step:
        raise LostError(f"step {best_step} is the best, and the model is of {load_bundle(run)[0].trained.step}")


def _row(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _sharding(out: Path) -> Program:
    made = out / "shard" / "state" / "set"
    arguments = ["shard", str(out / "images" / "test"), "--out", str(made), "--shard-mb", "0.01", "--workers", "1"]

    def promised(marks: list[str]) -> None:
        if "exit 0" in marks:
            check_files(Manifest.load(made))
            verify.require_whole(made, verify.verify(made, workers=1))

    return Program(
        "shard",
        "a sharding of 9 images",
        out / "shard",
        lambda: cli.main(arguments),
        promised,
        lambda: hashes(made),
    )


def _of_model(out: Path, name: str, words: str, where: str) -> Program:
    run = out / name / "state" / "run"
    arguments = {
        "evaluate": ["--split", "test", "--batch-size", "8", "--device", "cpu", "--workers", "0"],
        "average": ["--last", "2", "--batch-size", "8", "--device", "cpu"],
    }[name]

    def result() -> dict[str, Any]:
        return hashes(run / where) | hashes(run / "evaluations")

    def promised(marks: list[str]) -> None:
        check_run(run, step=STEPS, best_step=0)
        if "exit 0" in marks and not all(result().values()):
            raise LostError(f"{where} is missing")

    return Program(name, words, out / name, lambda: cli.main([name, str(run), *arguments]), promised, result)


def hashes(folder: Path) -> dict[str, Any]:
    """Return the sha256 of each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
