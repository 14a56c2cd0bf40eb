"""Opens what a run reads: manifest, plan, loaders of the training and the evaluation split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from wasteddp.data.forecast import train_plan
from wasteddp.data.loader import Batch, Loader, evaluation_loader, training_loader, training_steps
from wasteddp.data.manifest import Manifest, Split
from wasteddp.data.plan import TrainPlan
from wasteddp.data.quality import Labels
from wasteddp.data.reading import SplitReader
from wasteddp.errors import ShardError
from wasteddp.settings import Settings
from wasteddp.training.runtime import Runtime

_MAX_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Inputs:
    """Open for the length of a run."""

    manifest: Manifest
    plan: TrainPlan
    train_loader: Loader
    val_loader: Loader
    val_reader: SplitReader
    train: Split
    val: Split
    train_labels: Labels

    def batches(self, first_step: int, last_step: int, world: Runtime) -> Iterator[Batch]:
        """This rank's batches for the optimizer steps first_step .. last_step - 1 of the run."""
        steps = training_steps(self.plan, first_step, last_step, rank=world.rank, world_size=world.world_size)
        return self.train_loader.batches(steps)


@contextmanager
def opened(settings: Settings, world: Runtime) -> Iterator[Inputs]:
    """All ranks: the inputs, closed at the end of the block.

    Raises:
        ShardError, SettingsError: on every rank, if one of them cannot open or use the shards.
    """
    with ExitStack() as stack:
        with world.together():
            manifest = Manifest.load(settings.data.shards)
            train, val = manifest.split(settings.data.train_split), manifest.split(settings.data.eval_split)
            refuse_untrainable(manifest, train.name)
            plan = train_plan(train, settings)
            train_reader = stack.enter_context(SplitReader(manifest, train.name))
            val_reader = stack.enter_context(SplitReader(manifest, val.name))
        workers = settings.data.workers or min(world.threads, _MAX_WORKERS)
        pin_memory = world.device.type == "cuda"
        train_loader = training_loader(
            train_reader,
            seed=settings.run.seed,
            image_size_px=settings.data.image_size,
            crop_scale=settings.augment.crop_scale,
            crop_ratio=settings.augment.crop_ratio,
            workers=workers,
            prefetch=settings.data.prefetch,
            pin_memory=pin_memory,
            idle=world.device.type == "cpu",
        )
        val_loader = evaluation_loader(
            val_reader,
            image_size_px=settings.data.image_size,
            resize_px=settings.data.eval_resize_px,
            workers=workers,
            pin_memory=pin_memory,
        )
        yield Inputs(
            manifest=manifest,
            plan=plan,
            train_loader=stack.enter_context(train_loader),
            val_loader=stack.enter_context(val_loader),
            val_reader=val_reader,
            train=train,
            val=val,
            train_labels=train_reader.labels,
        )


def refuse_untrainable(manifest: Manifest, split: str) -> None:
    """A classifier needs two classes, and images of each."""
    if len(manifest.classes) < 2:
        raise ShardError(
            f"{manifest.folder} has one class only: {', '.join(manifest.classes) or 'none'}",
            "every answer would be right and nothing would be learned",
            "shard at least two classes",
        )
    counts = zip(manifest.classes, manifest.splits[split].samples_per_class, strict=True)
    empty = [name for name, count in counts if count == 0]
    if empty:
        raise ShardError(
            f"the split {split!r} of {manifest.folder} has no image of {', '.join(empty)}",
            "the model could never learn to say it",
            "add images of it, or leave the class out, and shard again",
        )
