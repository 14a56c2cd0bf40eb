"""The progress of a run, and which settings and data of a checkpoint may differ from those of the run that resumes.

Progress is the one small value, next to the tensors, from which a run resumes. `progress.json` holds it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import isfinite
from typing import Any

import yaml

from wasteddp.data.decoding.crop import MEAN_RGB, STD_RGB
from wasteddp.data.manifest import Manifest
from wasteddp.errors import CheckpointError
from wasteddp.settings import Data, Evaluate, Settings, leaves

_OTHER_ORDER = "the order changes from here on: the current epoch repeats some images and misses others"
# The effect of each difference on a run that resumes.
ACCEPTABLE: dict[str, str] = {
    "manifest": "the rest of the run trains on the images of another shard set, in another order",
    "seed": "the order and the crops change from here on: the current epoch repeats some images and misses others",
    "batch_size": "the same step is another position in the epochs and in the learning-rate schedule",
    "lanes": _OTHER_ORDER,
    "block": _OTHER_ORDER,
    "window": _OTHER_ORDER,
    "balance": "the classes are drawn differently from here on: the current epoch is incomplete",
    "train_split": "the rest of the run trains on the images of another split",
    "image_size": "the rest of the run trains at another image size",
    "teacher": "the rest of the run learns from another teacher, or without one",
    "mean": "the network sees the images in another range than the one it learned",
    "std": "the network sees the images in another range than the one it learned",
}
REFUSED: dict[str, str] = {
    "classes": "the network's outputs would stand for other classes",
    "arch": "the weights belong to another network",
    "optimizer": "the state of each weight belongs to another optimizer",
}
# The fields that decide which samples a step is made of.
_ORDER = ("manifest", "seed", "batch_size", "lanes", "block", "window", "balance", "train_split")
# Settings that change how a run is computed, watched or kept, and not what it trains.
_WITHOUT_INFLUENCE = (
    "run.out", "run.threads", "run.timeout_s", "data.shards", "data.staged", "data.workers", "data.decode",
    "data.prefetch", "data.cache", "data.cache_gb", "data.fetchers", "data.ahead_steps", "data.read_attempts",
    "data.read_timeout_s", "checkpoint.", "ddp.", "track.", "profile.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lineage:
    """What must not change unnoticed when a run resumes; the names are those of the settings or the manifest."""

    manifest: str  # sha256
    classes: tuple[str, ...]
    arch: str
    seed: int
    batch_size: int
    lanes: int
    block: int
    window: int
    train_split: str
    image_size: int
    optimizer: str
    teacher: str = ""  # sha256 of its weights; "": none
    balance: float = 0.0
    mean: tuple[float, ...] = MEAN_RGB  # model.mean and model.std; older checkpoints have ImageNet's
    std: tuple[float, ...] = STD_RGB

    @classmethod
    def of(cls, settings: Settings, manifest: Manifest, *, teacher: str = "") -> Lineage:
        return cls(
            manifest=manifest.sha256,
            classes=manifest.classes,
            arch=settings.model.arch,
            seed=settings.run.seed,
            batch_size=settings.train.batch_size,
            lanes=settings.num_lanes,
            block=settings.data.block,
            window=settings.data.window,
            train_split=settings.data.split_name(settings.data.train_split),
            image_size=settings.data.image_size,
            optimizer=settings.optimizer.name,
            teacher=teacher,
            balance=settings.data.balance,
            mean=settings.model.mean,
            std=settings.model.std,
        )

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Lineage:
        lists = {name: tuple(raw[name]) for name in ("classes", "mean", "std") if name in raw}
        return cls(**{**raw, **lists})


@dataclass(frozen=True, slots=True)
class Progress:
    """The position of a run. `step` alone is the position in the stream of samples: the epoch follows from the plan."""

    lineage: Lineage
    step: int = 0  # optimizer steps done
    best_value: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    damaged: int = 0  # training samples replaced so far
    covered: list[int] = field(default_factory=list)  # of the epoch, see `coverage_proof.add`; empty: not counted
    attempt: int = 1  # starts of this run, this one included
    tracker_id: str = ""
    scaler: dict[str, float] | None = None  # of fp16's GradScaler
    skipped: int = 0  # diverged steps that were skipped so far
    skipped_in_a_row: int = 0
    rollbacks: int = 0  # times that the run rolled back because it diverged
    lr_factor: float = 1.0  # of the learning rate, after these rollbacks
    unmeasured: dict[str, float] | None = None  # the step's metrics, if its evaluation was interrupted
    precision: str = ""  # of the run so far
    compiles: bool | None = None  # whether the network was compiled
    micro_batch: int = 0  # size that the run started with if train.max_micro_batch is 0; else 0
    best_in: str = ""  # the measure of `best_value`, see `measure_of`
    # changes of the order within this epoch: its images are not checked
    changed: list[str] = field(default_factory=list)

    def stopped_early(self, patience: int) -> bool:
        """Whether `patience` evaluations have passed without an improvement; never for 0."""
        return 0 < patience <= self.evaluations_since_best

    def with_evaluation(self, value: float) -> Progress:
        """Count an evaluation and update the best value. A value that is not finite is never the best."""
        if isfinite(value) and (self.best_value is None or value > self.best_value):
            return replace(self, best_value=value, best_step=self.step, evaluations_since_best=0)
        return replace(self, evaluations_since_best=self.evaluations_since_best + 1)

    @property
    def best_metric(self) -> dict[str, float]:
        """The best value as a row of metrics; empty before the first evaluation."""
        return {} if self.best_value is None else {"best/value": self.best_value}

    @property
    def counts(self) -> dict[str, float]:
        """The counts of events so far, as a row of metrics."""
        return {
            "train/damaged": self.damaged,
            "train/skipped": self.skipped,
            "train/rollbacks": self.rollbacks,
            "attempt": self.attempt,
        }

    def started_again(self, lineage: Lineage, measure: str) -> Progress:
        """Return the progress of the next attempt, with the lineage and the measure of the current settings.

        After a change of the order, the samples of the epoch are counted no further: its first steps followed another
        order. After a change of the measure, the best value starts again.

        Args:
            measure: `measure_of` the current settings.
        """
        changed = changes_of_order(self.lineage, lineage)
        again = replace(self, lineage=lineage, attempt=self.attempt + 1, best_in=measure)
        if changed:
            again = replace(again, covered=[], changed=sorted({*self.changed, *changed}))
        if self.best_in != measure:
            again = replace(again, best_value=None, best_step=0, evaluations_since_best=0)
        return again


def changes_of_order(then: Lineage, now: Lineage) -> list[str]:
    """The fields that differ and decide which samples a step is made of."""
    old, new = asdict(then), asdict(now)
    return [name for name in _ORDER if old[name] != new[name]]


def measure_of(data: Data, evaluate: Evaluate, manifest: str) -> str:
    """What an evaluation of a run measures, in words: two values of other measures cannot be compared.

    Args:
        data, evaluate: sections of the settings; those of a checkpoint may lack fields that are newer.
        manifest: its sha256.
    """
    return (
        f"{evaluate.metric} on {data.split_name(data.eval_split)} of manifest {manifest[:12]} "
        f"at {data.eval_size_px} px (resized to {data.eval_resize_px})"
    )


def refuse_finished(changes: Sequence[str], *, run: str, step: int) -> None:
    """Refuse to start a finished run with other settings: nothing would be trained with them.

    Args:
        changes: lines of `accepted_changes` and `changed_settings`.

    Raises:
        CheckpointError: at least one of the changes has an influence on what is trained.
    """
    lines = [line for line in changes if not line.removeprefix("changed: ").startswith(_WITHOUT_INFLUENCE)]
    if lines:
        raise CheckpointError(
            f"the run {run} is finished at step {step}, and this start differs: "
            + "; ".join(line.removeprefix("changed: ").removeprefix("accepted: ") for line in lines),
            "no step would be trained with it; the run's files stay as they are",
            f"a new run with these weights: wasteddp train --from {run} and these settings; a new run from the "
            "beginning: set run.out to a new folder; more epochs of this run: raise train.epochs alone",
        )


def accepted_changes(then: Lineage, now: Lineage, accepted: Collection[str], *, where: object) -> list[str]:
    """Return a line for each accepted difference.

    Args:
        then: the lineage of the checkpoint.
        now: the lineage of this run.
        accepted: names of fields that may differ: `--accept-changes`.
        where: the checkpoint, for the message.

    Raises:
        CheckpointError: a difference is not accepted or cannot be accepted, or a name is unknown.
    """
    if unknown := sorted(set(accepted) - ACCEPTABLE.keys()):
        why = "; ".join(f"{name}: {REFUSED[name]}" for name in unknown if name in REFUSED)
        raise CheckpointError(
            f"--accept-changes {','.join(unknown)}: this change cannot be accepted{f' ({why})' if why else ''}",
            "the run would not be the one that its checkpoint belongs to",
            f"name changes that can be accepted: {', '.join(ACCEPTABLE)}",
        )
    old, new = asdict(then), asdict(now)
    names = [field.name for field in fields(Lineage) if old[field.name] != new[field.name]]
    refused = [name for name in names if name not in accepted]
    lines = {name: f"{name} was {old[name]!r} and is {new[name]!r}" for name in names}
    if refused:
        can_be = all(name in ACCEPTABLE for name in refused)
        remedy = f", or accept it: --accept-changes {','.join(refused)}" if can_be else ""
        raise CheckpointError(
            f"{where} belongs to another run: " + "; ".join(lines[name] for name in refused),
            "; ".join(dict.fromkeys((ACCEPTABLE | REFUSED)[name] for name in refused)),
            f"restore the settings of that run, or set run.out to a new folder{remedy}",
        )
    return [f"accepted: {lines[name]}; {ACCEPTABLE[name]}" for name in names]


def changed_settings(then: str, now: Settings) -> list[str]:
    """Return a line for each setting that differs from the checkpoint, except run.out.

    Args:
        then: the settings of the checkpoint, as YAML.
    """
    old, new = dict(leaves(yaml.safe_load(then))), dict(leaves(now.model_dump(mode="json")))
    return [
        f"changed: {key} was {old[key]!r} and is {value!r}"
        for key, value in new.items()
        if key in old and old[key] != value and key != "run.out"
    ]
