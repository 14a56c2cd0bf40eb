"""Compute BatchNorm's running statistics for weights that no training step produced, such as a mean of several.

As in Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", section 3.2, training
images pass through the network again. Here they are centre views at the size of the evaluation, without augmentation,
because the model will be used on such images (Touvron et al. 2019, "Fixing the train-test resolution discrepancy", also
adapt the statistics to the size in use). The run's augmentation and its schedule of sizes are not needed.

Legend: B images in a batch, S their side in pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wasteddp.data.dataset import ShardSet
from wasteddp.data.decoding.crop import EvaluationView, normalise
from wasteddp.data.loader import Loader, training_steps
from wasteddp.data.train_plan import plan_training
from wasteddp.parallel import num_usable_cores
from wasteddp.settings import Settings

_PREFETCH = 2


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[torch.Tensor], names: Collection[str]) -> None:
    """Recompute BatchNorm's running statistics as the mean of the batches' statistics.

    Args:
        model: set to eval mode.
        batches: normalised images [B, 3, S, S], all of one size B: each batch has the same weight.
        names: names of the BatchNorms to recompute; the others are unchanged.
    """
    model.eval()
    norms = [module for name, module in model.named_modules() if name in names and isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: the cumulative mean
        norm.train()
    for images_BCHW in batches:
        model(images_BCHW)
    model.eval()


def training_batches(
    settings: Settings, shards: ShardSet, num_images: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield normalised training images on the device, [B, 3, S, S], with the preprocessing of an evaluation.

    They are in the order of the run's first epoch, in full batches of evaluate.batch_size, or in one smaller batch if
    there are fewer.

    Args:
        num_images: number of images, at most one epoch; a remainder that does not fill a batch is left out.
    """
    data, split = settings.data, shards.manifest.split(settings.data.train_split)
    with ExitStack() as stack:
        reader = stack.enter_context(shards.reader(split.name))
        plan = plan_training(split, data, reader.labels, batch_size=settings.train.batch_size, seed=settings.run.seed)
        steps = min(plan.steps_per_epoch, -(-num_images // plan.global_batch))
        planned = [part for _, _, part in training_steps(plan, 0, steps, rank=0, world_size=1)]
        samples = np.concatenate(planned)[:num_images] % reader.num_samples
        size = min(settings.evaluate.batch_size, len(samples))
        parts = samples[: len(samples) // size * size].reshape(-1, size)
        shards.require_room(reader.needs(parts[at : at + _PREFETCH + 1].reshape(-1)) for at in range(len(parts)))
        loader = stack.enter_context(
            Loader(
                reader,
                EvaluationView(data.eval_resize_px),
                image_size_px=data.eval_size_px,
                workers=num_usable_cores(),
                prefetch=_PREFETCH,
                replace=True,  # replace undecodable images, as in training
            )
        )
        for batch in loader.batches((0, number, part) for number, part in enumerate(parts)):
            yield normalise(batch.images_BCHW.to(device))
