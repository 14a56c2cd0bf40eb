"""A shard set in one's own training loop, with the order and the crops of `wasteddp train`.

Legend: B images of this rank's part of a step, S the side.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import torch

from wasteddp import environment, settings
from wasteddp.data.augmentation.augment import Augment
from wasteddp.data.batch import Batch
from wasteddp.data.dataset import open_dataset
from wasteddp.data.decoding.workers import start_workers
from wasteddp.data.loader import training_loader, training_steps
from wasteddp.data.train_plan import plan_training
from wasteddp.errors import CheckpointError, SettingsError

_MOST_STEPS = 2**48  # more than any run has, and times any batch size still an int64
_NOT_HERE = ("mixup", "cutmix")  # of a micro-batch, with the loss


class TrainingLoader:
    """Yields this rank's batches, each step of the run exactly once, in an order that is arithmetic.

    The order depends on the shard set, the seed and the settings, not on the number of processes or workers. It goes
    on after `load_state_dict` as if it had not been interrupted, also with another number of processes.

        with TrainingLoader("shards/mine", batch_size=64, seed=0) as loader:
            for _ in range(epochs):
                for batch in loader:                        # one epoch, or the rest of it after load_state_dict
                    images, labels = loader.tensors(batch, device)
                    ...                                     # forward, backward, optimizer
                    state = loader.state_dict()             # after the step: it counts as done

    Every rank must take every batch, or the ranks would wait for each other. An error is raised on the rank that
    meets it.

    Args:
        shards: folder or URL of the set.
        batch_size: images in a step of all ranks together; the number of ranks must divide it.
        image_size: S, px.
        seed: of the order, the crops and the augmentation.
        rank, world_size: None: those of torch.distributed, or of the launcher's environment, or 0 and 1.
        data: other settings of the section data, such as {"workers": 4, "balance": 0.5}; `wasteddp settings` lists
            them.
        augment: settings of the section augment, without mixup and cutmix.

    Attributes:
        classes: names of the labels 0, 1, ...
        steps_per_epoch: of all ranks alike.
        step: number of steps that were yielded, or that the loaded state has.

    Raises:
        SettingsError: a setting is not valid.
        ShardError: there is no set, or it has no such split.
    """

    def __init__(
        self,
        shards: str,
        *,
        batch_size: int,
        image_size: int = 224,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        data: Mapping[str, Any] | None = None,
        augment: Mapping[str, Any] | None = None,
    ) -> None:
        if given := [name for name in _NOT_HERE if (augment or {}).get(name)]:
            raise SettingsError(
                f"augment has {given[0]}, which mixes the targets of images",
                "the loader yields one label for each image",
                f"leave {given[0]} out, and mix in your own loop",
            )
        if twice := sorted({"shards", "image_size"} & set(data or {})):
            raise SettingsError(
                f"data has {twice[0]}, which is an argument of its own",
                f"there would be two values of {twice[0]}",
                f"give it as TrainingLoader(..., {twice[0]}=...)",
            )
        section = {**(data or {}), "shards": str(shards), "image_size": image_size}
        found = settings.parse(
            json.dumps(
                {
                    "data": section,
                    "augment": dict(augment or {}),
                    "train": {"batch_size": batch_size},
                    "run": {"seed": seed},
                },
                default=lambda value: value.item() if isinstance(value, np.generic) else os.fspath(value),
            )
        )
        self.rank, self.world_size = _ranks(rank, world_size)
        self.step, self._num_iterators = 0, 0
        batch_size, image_size, seed = found.train.batch_size, found.data.image_size, found.run.seed  # as integers
        self._augment = Augment.from_settings(found.augment, seed)
        with ExitStack() as stack:
            dataset = stack.enter_context(open_dataset(found.data, rank=self.rank))
            split = dataset.manifest.split(found.data.train_split)
            reader = stack.enter_context(dataset.reader(split.name))
            self._plan = plan_training(split, found.data, reader.labels, batch_size=batch_size, seed=seed)
            self._plan.step_samples(0, 0, rank=self.rank, world_size=self.world_size)  # refuses a number of ranks
            has_gpu = torch.cuda.is_available()
            workers = stack.enter_context(start_workers(found.data.workers, "cuda" if has_gpu else "cpu"))
            self._loader = training_loader(
                reader,
                seed=seed,
                image_size_px=image_size,
                crop_scale=found.augment.crop_scale,
                crop_ratio=found.augment.crop_ratio,
                workers=workers.number,
                prefetch=found.data.prefetch,
                pin_memory=has_gpu,
                idle=not has_gpu and workers.server is None,
                processes=workers.server is not None,
                largest_px=image_size,
                server=workers.server,
            )
            stack.callback(self._loader.close)
            stack.callback(dataset.end_fetching)
            self.classes = dataset.manifest.classes
            self._identity = {
                "manifest": dataset.manifest.sha256,
                "seed": seed,
                "batch_size": batch_size,
                "image_size": image_size,
                "lanes": self._plan.lanes,
                "block": found.data.block,
                "window": found.data.window,
                "balance": found.data.balance,
                "train_split": found.data.split_name(split.name),
            }
            self._stack = stack.pop_all()

    @property
    def steps_per_epoch(self) -> int:
        return self._plan.steps_per_epoch

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.step // self.steps_per_epoch

    def __len__(self) -> int:
        """Return the number of batches that the next `for` yields."""
        return self.steps_per_epoch - self.step % self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of an epoch, or the rest of it; the next call continues with the next epoch.

        A sample that cannot be read is replaced by the next one and listed in `Batch.damage`.
        """
        self._num_iterators += 1
        number, first = self._num_iterators, self.step
        steps = training_steps(self._plan, first, first + len(self), rank=self.rank, world_size=self.world_size)
        for batch in self._loader.batches(steps):
            if number != self._num_iterators:
                raise CheckpointError(
                    "an earlier `for` over this loader went on after a newer one or after load_state_dict",
                    "its batches would be counted at the place of others",
                    "leave it, and begin a new `for`",
                )
            self.step += 1
            yield batch

    def tensors(self, batch: Batch, device: str | torch.device = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch on the device: images, augmented and normalised, float32 [B, 3, S, S]; labels, int64 [B]."""
        images_BCHW = batch.images_BCHW.to(device, non_blocking=True)
        labels_B = batch.labels_B.to(device, non_blocking=True)
        return self._augment(images_BCHW, batch.samples, batch.epoch), labels_B

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it is a position in, as plain values. It is the same on every rank."""
        return {"step": self.step, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the steps of a state.

        Raises:
            CheckpointError: it is the position in another order.
        """
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"the state is a {type(state).__name__}",
                "it has no position",
                "give what TrainingLoader.state_dict returned",
            )
        step = state.get("step")
        others = [
            f"{name} {state.get(name)!r} instead of {value!r}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if others or isinstance(step, bool) or not isinstance(step, int | np.integer) or not 0 <= step < _MOST_STEPS:
            raise CheckpointError(
                f"the state belongs to another order: {', '.join(others) or f'its step is {step!r}'}",
                "the epoch would repeat some images and miss others",
                "create the loader with the arguments that it had when the state was saved",
            )
        self.step = int(step)
        self._num_iterators += 1  # those before are no longer used

    def close(self) -> None:
        """Stop the workers and close the set."""
        self._stack.close()

    def __enter__(self) -> TrainingLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise SettingsError(
            "only one of rank and world_size is given", "the ranks would not share the images", "give both, or neither"
        )
    if rank is not None and world_size is not None:
        is_valid = all(isinstance(one, int | np.integer) for one in (rank, world_size)) and 0 <= rank < world_size
        if not is_valid:
            raise SettingsError(
                f"rank is {rank!r} and world_size is {world_size!r}",
                "the rank would have no images, or those of another",
                "give integers, with rank from 0 to world_size - 1",
            )
        return int(rank), int(world_size)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return environment.launched("RANK", 0), environment.launched("WORLD_SIZE", 1)
