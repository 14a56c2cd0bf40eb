"""Opens the inputs of a run: the manifest, the plan and the loaders of the training and evaluation splits.

`CacheForecast` computes from the plan which shards the ranks of this machine will read, for the shared cache of a
remote shard set. A local set does not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from wasteddp import environment
from wasteddp.data.batch import Batch, copied_ahead
from wasteddp.data.dataset import Needs, open_dataset
from wasteddp.data.decoding.workers import DecodeServer, default_workers
from wasteddp.data.loader import AnyLoader, evaluation_loader, training_loader, training_steps
from wasteddp.data.manifest import Manifest, Split, shared_shards
from wasteddp.data.reader import SplitReader
from wasteddp.data.train_plan import plan_training
from wasteddp.errors import SettingsError, ShardError, StoppedError, WastedError, joined, print_warning
from wasteddp.order.keyed_random import I64
from wasteddp.order.plan import EvaluationPlan, TrainPlan
from wasteddp.order.plan_quality import Labels
from wasteddp.settings import Data, Settings
from wasteddp.training.distributed.runtime import Runtime, has_gpu
from wasteddp.training.schedule import side_px
from wasteddp.training.watchdog.exits import STOP

_MOST_NAMED = 3
_MOMENTS = 64  # sampled evenly over the run, to estimate the cache that it needs


@dataclass(frozen=True, slots=True)
class Inputs:
    """The open inputs of a run."""

    manifest: Manifest
    plan: TrainPlan
    train_loader: AnyLoader
    val_loader: AnyLoader
    val_reader: SplitReader
    cache_forecast: CacheForecast
    train: Split
    val: Split
    train_labels: Labels

    @property
    def share_of_classes(self) -> tuple[float, ...]:
        """Fraction of the training samples in each class (of the draws, with data.balance); the sum is 1."""
        counts = self.plan.balance.quotas.tolist() if self.plan.balance else self.train.samples_per_class
        return tuple(count / sum(counts) for count in counts)

    def batches(self, first_step: int, last_step: int, runtime: Runtime) -> Iterator[Batch]:
        """Yield this rank's batches for the optimizer steps first_step .. last_step - 1 of the run.

        An error is passed on as a batch with a `failure`: if it were raised here, the other ranks would wait for this
        one. A wait for a store that a signal ended is not a failure: the loop sees the signal and all ranks save.
        """
        steps = training_steps(self.plan, first_step, last_step, rank=runtime.rank, world_size=runtime.world_size)
        self.cache_forecast.train_reader.expect(self.cache_forecast.others(first_step, last_step))
        try:
            yield from copied_ahead(self.train_loader.batches(steps), runtime.device)
        except StoppedError as error:
            yield replace(Batch.failed(error), failure=None)
        except WastedError as error:
            yield Batch.failed(error)

    def at_work(self) -> str:
        """Describe what the loaders' threads are doing, for the watchdog's messages."""
        return self.train_loader.at_work() or self.val_loader.at_work()


@contextmanager
def open_inputs(settings: Settings, runtime: Runtime, server: DecodeServer | None = None) -> Iterator[Inputs]:
    """Open the inputs, and close them at the end of the block. All ranks.

    Args:
        server: the server of the decoding processes, if `start_early` started it.

    Raises:
        ShardError, SettingsError: on every rank: one of them cannot open or use the shards.
    """
    with ExitStack() as stack:
        with runtime.sharing_errors():
            refuse_device_decoding(settings.data.decode, runtime.device.type)
            shards = stack.enter_context(open_dataset(settings.data, rank=runtime.rank, stopped=STOP.__bool__))
            manifest = shards.manifest
            train, val = manifest.split(settings.data.train_split), manifest.split(settings.data.eval_split)
            refuse_untrainable(manifest, train.name)
            refuse_shared(manifest, train.name, val.name)
            train_reader = stack.enter_context(shards.reader(train.name, stopped=STOP.__bool__))
            val_reader = stack.enter_context(shards.reader(val.name, stopped=STOP.__bool__))
            plan = plan_training(
                train, settings.data, train_reader.labels, batch_size=settings.train.batch_size, seed=settings.run.seed
            )
            cache_forecast = CacheForecast(
                train_plan=plan,
                train_reader=train_reader,
                val_plan=EvaluationPlan(val.num_samples, settings.evaluate.batch_size),
                val_reader=val_reader,
                evaluate_every=settings.evaluate.every_steps or plan.steps_per_epoch,
                rank=runtime.rank,
                ranks=ranks_here(runtime.rank, runtime.world_size),
                world_size=runtime.world_size,
            )
            num_steps, in_flight = plan.steps_per_epoch * settings.train.epochs, settings.data.prefetch + 1
            shards.require_room(
                cache_forecast.train_windows(num_steps, in_flight), cache_forecast.val_windows(in_flight)
            )
        refuse_different_sets(manifest, runtime)
        processes = settings.data.uses_processes(runtime.device.type)
        workers = settings.data.num_workers or default_workers(
            runtime.cores if processes else runtime.threads, processes=processes
        )
        if processes and server is None:
            server = stack.enter_context(DecodeServer())
        pin_memory = runtime.device.type == "cuda"
        train_loader = training_loader(
            train_reader,
            seed=settings.run.seed,
            image_size_px=partial(
                side_px, schedule=settings.schedule, full_px=settings.data.image_size, epochs=settings.train.epochs
            ),
            crop_scale=settings.augment.crop_scale,
            crop_ratio=settings.augment.crop_ratio,
            workers=workers,
            prefetch=settings.data.prefetch,
            pin_memory=pin_memory,
            idle=runtime.device.type == "cpu",
            on_device=settings.data.decode == "gpu",
            processes=processes,
            largest_px=settings.data.image_size,
            server=server,
            warn=lambda words: print_warning(f"rank {runtime.rank}: {words}"),
        )
        val_loader = evaluation_loader(
            val_reader,
            image_size_px=settings.data.eval_size_px,
            resize_px=settings.data.eval_resize_px,
            workers=workers,
            pin_memory=pin_memory,
            processes=processes,
            server=server,
            warn=lambda words: print_warning(f"rank {runtime.rank}: {words}"),
        )
        for loader in (train_loader, val_loader):
            stack.callback(loader.close)
        stack.callback(shards.end_fetching)  # before the loaders' threads are joined: they may wait for a store
        yield Inputs(
            manifest=manifest,
            plan=plan,
            train_loader=train_loader,
            val_loader=val_loader,
            val_reader=val_reader,
            cache_forecast=cache_forecast,
            train=train,
            val=val,
            train_labels=train_reader.labels,
        )


@contextmanager
def start_early(data: Data) -> Iterator[DecodeServer | None]:
    """Start the server of the decoding processes, if the run will use any. It imports its modules while this process
    joins the other ranks and starts CUDA."""
    if not data.uses_processes("cuda" if has_gpu() else "cpu"):
        yield None
        return
    with DecodeServer() as server:
        yield server


def refuse_device_decoding(decode: str, device_type: str) -> None:
    """Raise a SettingsError if data.decode is gpu and there is no GPU."""
    if decode == "gpu" and device_type != "cuda":
        raise SettingsError(
            f"data.decode is gpu and this process computes on {device_type}",
            "its images would never be decoded",
            "set data.decode to cpu, or run on a machine with a CUDA device",
        )


def refuse_different_sets(manifest: Manifest, runtime: Runtime) -> None:
    """Raise a ShardError if the ranks read different manifests, from different copies or at different times. All
    ranks."""
    found = runtime.gather(manifest.sha256)
    other = next((rank for rank, sha256 in enumerate(found) if sha256 != found[0]), None)
    if other is not None:
        raise ShardError(
            f"{manifest.where}: rank 0 reads the manifest {found[0][:12]} and rank {other} {found[other][:12]}",
            "the ranks would train on different sets of images",
            "copy the same shard set to every machine, and do not write to it while a training starts",
        )


def refuse_shared(manifest: Manifest, train: str, val: str) -> None:
    """Raise a ShardError if two splits share a tar. Settings that name one split for both are taken as they are."""
    shared = shared_shards(manifest, (train, val))
    if shared:
        raise ShardError(
            f"{manifest.where}: {len(shared)} tar(s) are in both splits: {', '.join(shared[:_MOST_NAMED])}",
            "the model would be evaluated on images that it was trained on",
            "make the set again with `wasteddp shard` or `wasteddp index`, each tar in one split",
        )


def refuse_untrainable(manifest: Manifest, split: str) -> None:
    """Raise a ShardError unless there are two classes and training images of each."""
    if len(manifest.classes) < 2:
        raise ShardError(
            f"{manifest.where} has fewer than two classes: {joined(manifest.classes) or 'none'}",
            "every prediction would be right and the model would learn nothing",
            "create shards of at least two classes",
        )
    counts = zip(manifest.classes, manifest.splits[split].samples_per_class, strict=True)
    empty = [name for name, count in counts if count == 0]
    if empty:
        raise ShardError(
            f"the split {split!r} of {manifest.where} has no image of {joined(empty)}",
            "the model cannot learn this class",
            "add images of this class, or leave the class out, and create the shards again",
        )


@dataclass(frozen=True, slots=True)
class CacheForecast:
    """The shards that the ranks of this machine will read in training and evaluation, for a shared cache."""

    train_plan: TrainPlan
    train_reader: SplitReader
    val_plan: EvaluationPlan
    val_reader: SplitReader
    evaluate_every: int  # steps
    rank: int
    ranks: range  # the ranks of this machine
    world_size: int

    def others(self, first_step: int, last_step: int) -> Iterator[frozenset[str]]:
        """Yield for each step the shards that other ranks of this machine, or an evaluation, read in it."""
        val = frozenset(self.val_reader.needs(np.arange(self.val_plan.num_samples)))
        for step in range(first_step, last_step):
            ranks = (rank for rank in self.ranks if rank != self.rank)
            needed = frozenset(shard for rank in ranks for shard in self.train_reader.needs(self._train(step, rank)))
            evaluates = (step + 1) % self.evaluate_every == 0 or step + 1 == last_step
            yield needed | val if evaluates else needed

    def train_windows(self, num_steps: int, in_flight: int) -> Iterator[Needs]:
        """Yield what the machine must hold at the same time, sampled at some steps of a run of `num_steps`."""
        return self._windows(self.train_reader, self._train, num_steps, in_flight)

    def val_windows(self, in_flight: int) -> Iterator[Needs]:
        """The same for an evaluation."""

        def samples(number: int, rank: int) -> I64:
            return self.val_plan.batch_samples(number, rank=rank, world_size=self.world_size)

        return self._windows(self.val_reader, samples, self.val_plan.num_batches(self.world_size), in_flight)

    def _train(self, step: int, rank: int) -> I64:
        epoch, step_in_epoch = divmod(step, self.train_plan.steps_per_epoch)
        return self.train_plan.step_samples(epoch, step_in_epoch, rank=rank, world_size=self.world_size)

    def _windows(
        self, reader: SplitReader, samples: Callable[[int, int], I64], num_steps: int, in_flight: int
    ) -> Iterator[Needs]:
        for first in np.unique(np.linspace(0, max(0, num_steps - in_flight), _MOMENTS, dtype=np.int64)).tolist():
            steps = range(first, min(first + in_flight, num_steps))
            yield reader.needs(np.concatenate([samples(step, rank) for step in steps for rank in self.ranks]))


def ranks_here(rank: int, world_size: int) -> range:
    """Return the ranks of this machine: launchers number them consecutively."""
    here = environment.launched("LOCAL_WORLD_SIZE", 1) if world_size > 1 else 1
    first = rank - environment.launched("LOCAL_RANK", 0) if world_size > 1 else 0
    return range(first, first + here)
