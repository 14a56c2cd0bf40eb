"""One pass over a split, on all ranks, that proves it counted each sample once.

Legend: B images in a rank's batch, K classes.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wasteddp.data.images import normalise
from wasteddp.data.loader import Loader, evaluation_steps
from wasteddp.data.plan import PADDING, EvaluationPlan
from wasteddp.errors import ShardError, WastedError
from wasteddp.inference.metrics import summarise
from wasteddp.training.runtime import Runtime


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, samples_per_class: npt.ArrayLike, runtime: Runtime, batch: int
) -> dict[str, float]:
    """All ranks: the "val/..." metrics of the whole split, the same on every rank.

    Args:
        model: prepared by Accelerate; its running statistics the same on every rank. Left in eval mode.
        samples_per_class: of the split, from the manifest: [K].
        batch: images that each rank takes through the network at once.

    Raises:
        DamagedSampleError: on every rank, when a sample of one of them cannot be read.
        ShardError: the samples counted are not those of the manifest.
    """
    began = time.perf_counter()
    expected = np.asarray(samples_per_class, dtype=np.int64)
    plan = EvaluationPlan(int(expected.sum()), batch)
    classes = len(expected)
    # [K * K] counts of (true, predicted), and the sum of the losses
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=runtime.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    model.eval()
    failure: WastedError | None = None
    try:
        for item in loader.batches(evaluation_steps(plan, rank=runtime.rank, world_size=runtime.world_size)):
            real = torch.from_numpy(item.samples != PADDING).to(runtime.device)
            labels_B = item.labels_B.to(runtime.device, non_blocking=True)
            logits_BK = model(normalise(item.images_BCHW.to(runtime.device, non_blocking=True))).float()
            losses_B = nn.functional.cross_entropy(logits_BK, labels_B, reduction="none")
            loss_sum += losses_B[real].sum()
            counts += torch.bincount((labels_B * classes + logits_BK.argmax(1))[real], minlength=classes * classes)
    except WastedError as error:
        failure = error
    with runtime.together():  # the forward passes above hold no collective: eval mode, no gradients
        if failure:
            raise failure
    confusion = runtime.sum(counts).cpu().numpy().reshape(classes, classes)  # all ranks
    total_loss = float(runtime.sum(loss_sum))  # all ranks
    if not np.array_equal(confusion.sum(1), expected):
        raise ShardError(
            f"the evaluation counted {confusion.sum(1).tolist()} samples of the classes; "
            f"the manifest says {expected.tolist()}",
            "an accuracy over other samples than the split's would be reported as the split's",
            "check the set with `wasteddp verify`",
        )
    metrics = summarise(confusion)
    return {
        "val/loss": total_loss / plan.num_samples,
        "val/accuracy": metrics.accuracy,
        "val/macro_recall": metrics.macro_recall,
        "val/macro_f1": metrics.macro_f1,
        "val/samples": metrics.num_samples,
        "val/seconds": time.perf_counter() - began,
    }
