"""Evaluates a split on all ranks, and proves that each sample was counted once.

Legend: B images in a rank's batch, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from wasteddp.data.augmentation.operations import to_device
from wasteddp.data.decoding.crop import normalise
from wasteddp.data.loader import evaluation_steps
from wasteddp.errors import ShardError, StoppedError, WastedError
from wasteddp.inference.metrics import F32, I64, Answers, Mistakes, Reliability, Seen, summarise
from wasteddp.order.plan import PADDING, EvaluationPlan
from wasteddp.settings import Model
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.watchdog.exits import STOP

_MOST_PROBABILITIES = 4_000_000  # of a split, which each rank receives in 16 MB to calibrate the best model


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Inputs, runtime: Runtime, batch: int, settings: Model
) -> tuple[dict[str, float], Seen]:
    """Return the "val/..." metrics of the evaluation split and its details, the same on every rank. All ranks.

    Args:
        model: prepared by Accelerate, with the same running statistics on every rank. It is left in eval mode.
        batch: number of images in a rank's forward pass.
        settings: of the network: how its images are normalised.

    Raises:
        DamagedSampleError: on every rank: a rank cannot read one of its samples.
        ShardError: the counted samples are not those of the manifest.
        StoppedError: on every rank: a rank received a stop signal.
    """
    began = time.perf_counter()
    split, classes = data.val, data.manifest.classes
    plan = EvaluationPlan(split.num_samples, batch)
    num_classes = len(classes)
    # All results stay on the device until the end, so that a batch does not wait for the previous one:
    # [K * K] counts of (true, predicted), the sum of the losses, and rows of (label, predicted, confidence, probability
    # of the true class)
    counts = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=runtime.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    samples, rows = [np.zeros(0, np.int64)], [torch.zeros((4, 0), device=runtime.device)]
    keeps = split.num_samples * num_classes <= _MOST_PROBABILITIES
    shares = [torch.zeros((0, num_classes), device=runtime.device)]
    model.eval()
    failure: WastedError | None = None
    try:
        batches = data.val_loader.batches(evaluation_steps(plan, rank=runtime.rank, world_size=runtime.world_size))
        for item in runtime.watch.over(batches, "evaluating"):
            if STOP:
                raise StoppedError("the run was asked to stop while it evaluated")
            real = to_device(item.samples != PADDING, runtime.device)
            labels_B = item.labels_B.to(runtime.device, non_blocking=True)
            images_BCHW = item.images_BCHW.to(runtime.device, non_blocking=True)
            logits_BK = model(normalise(images_BCHW, settings.mean, settings.std)).float()
            losses_B = nn.functional.cross_entropy(logits_BK, labels_B, reduction="none")
            shares_BK = logits_BK.softmax(1)
            confidence_B, predicted_B = shares_BK.max(1)
            if keeps:
                shares.append(shares_BK)
            # padding is multiplied by 0: a mask index or bincount would synchronize the host with the device
            loss_sum += (losses_B * real).sum()
            counts.scatter_add_(0, labels_B * num_classes + predicted_B, real.long())
            samples.append(item.samples)
            # exp(-cross-entropy) is the probability of the true class; float32 counts classes exactly up to 16 million
            rows.append(torch.stack([labels_B, predicted_B, confidence_B, (-losses_B).exp()]))
    except WastedError as error:
        failure = error
    with runtime.sharing_errors():  # the forward passes above use no collectives: eval mode, no gradients
        if failure:
            raise failure
    confusion = runtime.sum(counts).cpu().numpy().reshape(num_classes, num_classes)  # all ranks
    total_loss = float(runtime.sum(loss_sum))  # all ranks
    if confusion.sum(1).tolist() != list(split.samples_per_class):
        raise ShardError(
            f"the evaluation counted {confusion.sum(1).tolist()} samples of the classes; "
            f"the manifest says {list(split.samples_per_class)}",
            "the reported accuracy would not be that of the split",
            "check the shard set with `wasteddp verify`",
        )
    metrics = summarise(confusion)
    seen_samples = np.concatenate(samples)
    is_real = seen_samples != PADDING
    real_rows = torch.cat(rows, dim=1).cpu().numpy()[:, is_real]
    own_shares = torch.cat(shares).cpu().numpy()[is_real if keeps else slice(0)]
    labels, predicted, confidence, of_truth = real_rows
    answers = Answers(
        seen_samples[is_real],
        labels.astype(np.int64),
        predicted.astype(np.int64),
        confidence,
        of_truth,
    )
    kept = (answers.samples, answers.labels, own_shares) if keeps else None
    parts = runtime.gather((Reliability.measure(answers), Mistakes.find(answers), kept))  # all ranks
    labels_N, probabilities_NK = _in_order([part for *_, part in parts if part is not None])
    seen = Seen(
        split=split.name,
        classes=classes,
        confusion=confusion,
        metrics=metrics,
        reliability=Reliability.merge(part for part, *_ in parts),
        mistakes=Mistakes.merge(part for _, part, _ in parts),
        labels_N=labels_N,
        probabilities_NK=probabilities_NK,
    )
    return {
        "val/loss": total_loss / plan.num_samples,
        "val/accuracy": metrics.accuracy,
        "val/macro_recall": metrics.macro_recall,
        "val/macro_f1": metrics.macro_f1,
        "val/samples": metrics.num_samples,
        "val/seconds": time.perf_counter() - began,
        **{
            f"val/recall/{name}": one.recall
            for name, one in zip(classes, metrics.per_class, strict=True)
            if one.support  # undefined for a class without samples
        },
    }, seen


def _in_order(parts: Sequence[tuple[I64, I64, F32]]) -> tuple[I64 | None, F32 | None]:
    """Return the labels [N] and probabilities [N, K] of all ranks in the order of the split; None if none were kept."""
    if not parts:
        return None, None
    samples, labels, shares = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(samples)
    return labels[order], shares[order]
