"""A run's state on disk: whole, checked by hash before it is trusted, without a pickle.

    checkpoints/step-00001234/model.safetensors       inner keys: no `module.`
                              optimizer.safetensors   "key:parameter name"
                              progress.json           where the run is, and what it was made from
                              settings.yaml
                              complete.json           sha256 of each file above; written last
    checkpoints/.step-00001234.tmp/                   what a kill leaves; removed at the next start

The loop waits only for the copy of the tensors; a thread writes, syncs and renames, and prunes after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from wasteddp.data.manifest import Manifest, sync_folder
from wasteddp.errors import CheckpointError, StorageError, storage
from wasteddp.settings import Settings

FORMAT = "wasteddp-checkpoint"
FORMAT_VERSION = 1
_COMPLETE = "complete.json"
_PROGRESS = "progress.json"


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a checkpoint can only be continued with; the names are those of the settings or the manifest."""

    manifest: str  # sha256
    classes: tuple[str, ...]
    arch: str
    seed: int
    batch_size: int
    lanes: int
    image_size: int
    optimizer: str
    block: int = 1  # defaults: of checkpoints from before they were kept
    window: int = 0

    @classmethod
    def of(cls, settings: Settings, manifest: Manifest) -> Lineage:
        return cls(
            manifest=manifest.sha256,
            classes=manifest.classes,
            arch=settings.model.arch,
            seed=settings.run.seed,
            batch_size=settings.train.batch_size,
            lanes=settings.num_lanes,
            image_size=settings.data.image_size,
            optimizer=settings.optimizer.name,
            block=settings.data.block,
            window=settings.data.window,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. The place in the stream is `step` alone: the epoch follows from the plan."""

    lineage: Lineage
    step: int = 0  # optimizer steps done
    best_value: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    damaged: int = 0  # training samples replaced so far
    covered: list[int] = field(default_factory=list)  # of the epoch: see training.coverage; empty: not counted
    attempt: int = 1  # starts of this run, this one included
    tracker_id: str = ""
    scaler: Mapping[str, float] | None = None  # of fp16's GradScaler
    skipped: int = 0  # steps without an update so far, because they diverged
    skipped_in_a_row: int = 0
    rollbacks: int = 0  # times that the run went back because it diverged
    lr_factor: float = 1.0  # what they have made of the learning rate

    def stopped_early(self, patience: int) -> bool:
        """Whether `patience` evaluations have passed without a better one; 0 is endless patience."""
        return 0 < patience <= self.evaluations_since_best

    def with_evaluation(self, value: float) -> Progress:
        if self.best_value is None or value > self.best_value:
            return replace(self, best_value=value, best_step=self.step, evaluations_since_best=0)
        return replace(self, evaluations_since_best=self.evaluations_since_best + 1)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was read, and whose bytes are those that were written."""

    path: Path
    progress: Progress
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def listed(folder: Path) -> list[Path]:
    """Checkpoints of a run, the oldest first, whole or not."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())


def starting_point(folder: Path, resume: str, lineage: Lineage, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from; None to begin at the beginning.

    Args:
        folder: `runs/<name>/checkpoints`.
        resume: "auto", "never" or a checkpoint's path.
        lineage: of this run; a checkpoint of another one is refused.
        say: takes a line for each checkpoint that is passed over.

    Raises:
        CheckpointError: what was asked for cannot be had, or belongs to another run.
    """
    if resume == "never":
        if there := listed(folder):
            raise CheckpointError(
                f"--resume never, and {folder} holds {len(there)} checkpoints, the newest of step {step_of(there[-1])}",
                "a new run would overwrite them one by one",
                f"set run.out to a new folder, or remove {folder.parent} yourself, or use --resume auto to go on",
            )
        return None
    checkpoint = newest(folder, say) if resume == "auto" else read(Path(resume))
    if checkpoint:
        refuse_other_lineage(checkpoint, lineage)
    return checkpoint


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
        complete = json.loads((path / _COMPLETE).read_bytes())
        if (complete["format"], complete["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"format {complete['format']} {complete['format_version']}")
        contents = {}
        for name, sha256 in complete["sha256"].items():
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not a plain file name")
            contents[name] = (path / name).read_bytes()
            found = hashlib.sha256(contents[name]).hexdigest()
            if found != sha256:
                raise ValueError(f"{name} has {len(contents[name])} bytes with sha256 {found[:12]}, not {sha256[:12]}")
        raw = json.loads(contents[_PROGRESS])
        stored = raw.pop("lineage")
        lineage = Lineage(**{**stored, "classes": tuple(stored["classes"])})
        return Checkpoint(
            path,
            Progress(lineage=lineage, **raw),
            load(contents["model.safetensors"]),
            load(contents["optimizer.safetensors"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: {error}",
            "the weights in it may not be those that were trained",
            "use another one, or --resume auto, which takes the newest that is whole",
        ) from error


def refuse_other_lineage(checkpoint: Checkpoint, wanted: Lineage) -> None:
    """Raises a CheckpointError that lists what differs between the checkpoint and this run, if anything does."""
    then, now = asdict(checkpoint.progress.lineage), asdict(wanted)
    different = [f"{key} was {then[key]!r} and is {now[key]!r}" for key in now if then[key] != now[key]]
    if different:
        raise CheckpointError(
            f"{checkpoint.path} belongs to another run: " + "; ".join(different),
            "the samples, the steps or the weights would not be those of one run",
            "restore the settings of that run, or set run.out to a new folder",
        )


def refuse_full_disk(folder: Path, num_bytes: int) -> None:
    """Raises a StorageError if the disk of `folder` has no room for `num_bytes`."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise StorageError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free; the checkpoints take {num_bytes / 1e6:,.0f} MB",
            "the run would end at one of its saves",
            "free some space, set run.out to a folder on another disk, or lower checkpoint.keep_last",
        )


class CheckpointWriter:
    """Writes checkpoints behind the loop's back. Rank 0 only.

    Args:
        folder: `runs/<name>/checkpoints`.
        keep_last: newest ones kept, besides the best.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self._folder, self._keep_last = folder, keep_last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._work: Callable[[], None] = lambda: None
        with storage("making the checkpoints' folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
            for remains in folder.glob(".step-*.tmp"):
                shutil.rmtree(remains)

    def save(
        self,
        progress: Progress,
        model: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
        settings_yaml: str,
        first: Callable[[Mapping[str, torch.Tensor]], object] | None = None,
    ) -> None:
        """Copies the tensors and returns; the copy is written by a thread.

        Args:
            first: called in that thread with the model's copy, before the checkpoint is written: after a kill between
                the two, the run goes on from the checkpoint before and comes to the same place again.

        Raises:
            StorageError: the save before this one failed. What was complete before it is untouched.
        """
        self.wait()
        tensors = {"model.safetensors": _copied(model), "optimizer.safetensors": _copied(optimizer)}
        self._work = partial(self._keep, progress, tensors, settings_yaml, first)
        self.again()

    def again(self) -> None:
        """Hands over once more what was handed over last: after a save that failed."""
        self._pending = self._thread.submit(self._work)

    def wait(self) -> None:
        """Until what was handed over is on the disk.

        Raises:
            StorageError: it is not, and will not be.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=True)

    def _keep(
        self,
        progress: Progress,
        tensors: Mapping[str, dict[str, torch.Tensor]],
        settings_yaml: str,
        first: Callable[[Mapping[str, torch.Tensor]], object] | None,
    ) -> None:
        if first:
            first(tensors["model.safetensors"])
        try:
            self._write(progress, tensors, settings_yaml)
        except StorageError:  # a full disk needs its space back
            shutil.rmtree(self._folder / f".step-{progress.step:08d}.tmp", ignore_errors=True)
            raise

    def _write(self, progress: Progress, tensors: Mapping[str, dict[str, torch.Tensor]], settings_yaml: str) -> None:
        final = self._folder / f"step-{progress.step:08d}"
        temporary = self._folder / f".{final.name}.tmp"
        with storage("writing a checkpoint", final):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            contents = {name: save(part) for name, part in tensors.items()}
            contents[_PROGRESS] = json.dumps(asdict(progress), indent=1).encode()
            contents["settings.yaml"] = settings_yaml.encode()
            sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
            complete = {"format": FORMAT, "format_version": FORMAT_VERSION, "sha256": sha256}
            for name, content in {**contents, _COMPLETE: json.dumps(complete, indent=1).encode()}.items():
                with (temporary / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(temporary)
            if final.exists():  # the same step once more: after a resume that passed over a damaged one
                final.rename(self._folder / f".{final.name}.replaced.tmp")
            temporary.rename(final)
            sync_folder(self._folder)
            shutil.rmtree(self._folder / f".{final.name}.replaced.tmp", ignore_errors=True)
            self._prune(progress.best_step)

    def _prune(self, best_step: int) -> None:
        for old in listed(self._folder)[: -self._keep_last]:
            if step_of(old) != best_step:
                shutil.rmtree(old)


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory, contiguous: safetensors refuses channels-last."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
