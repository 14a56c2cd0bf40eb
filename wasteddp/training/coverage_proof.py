"""Proofs of what a run trained on: the coverage of each epoch, and with run.record_steps a hash of each step.

Coverage. At the end of each epoch the ranks prove that together they trained on each of its samples exactly once or,
with data.balance, exactly as often as the epoch draws it. The proof counts the samples that the loader read for each
row of a batch, not those that the plan asked for. (The reader checks by sha256 that the bytes are those of the sample
number.) The expected count and hash come from the number of samples in the manifest and the few that the epoch leaves
out, so an order that is not a permutation is detected too.

With data.balance an epoch shares some passes over a class with the epochs before and after it (see `order.balance`).
The proof then shows: (1) the epoch has as many draws as the quotas of the classes together; (2) the samples read,
together with those that the other epochs draw from the shared passes, are each sample of each class once for each of
these passes. The sum over the draws does not depend on their order, lane, rank or step. A shuffle that loses or
repeats draws breaks (1) or (2). So does a pass that is not a permutation of its class: the samples of whole passes
come from the index and those of the other epochs from the rest of the pass, not from the draws that were read. That
each class has its quota follows from (2), because the quotas divide the passes.

A damaged sample that was replaced counts as itself and its replacement is not counted. The metrics report the number of
replaced samples separately.

Step hashes. With run.record_steps, steps.jsonl has one line for each step: {"step": 7, "samples": hash of the sample
numbers in the order of the plan, "images": hash of the decoded and cropped bytes in the same order, "weights": hash of
the parameters after the step}. Two runs that must be equal can be compared line by line. The samples and images do not
depend on the number of ranks; the weights do. Losses and learning rates are in metrics.jsonl, for each step with
train.log_every_steps 1. Each step copies the parameters to the host and hashes them, so this is for
`wasteddp verify-resume` and tests, not for long runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from wasteddp.data.batch import Batch
from wasteddp.errors import CoverageError
from wasteddp.order.coverage import digest, digest_of_epoch, to_signed
from wasteddp.order.keyed_random import I64
from wasteddp.order.plan import PADDING, TrainPlan
from wasteddp.settings import Run
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.tracking.journal import roll_back
from wasteddp.training.tracking.tracker import Tracker

STEPS = "steps.jsonl"
_HEX_DIGITS = 16


def count(batch: Batch, seed: int) -> tuple[int, int]:
    """Return (number of samples, hash) of one rank's batch. Both are summed over the ranks."""
    read: I64 = batch.read_B[batch.read_B != PADDING]
    planned = np.array([item.sample for item in batch.damage], dtype=np.int64)
    stand_ins = np.array([item.replaced_by for item in batch.damage], dtype=np.int64)
    found = digest(seed, read) + digest(seed, planned) - digest(seed, stand_ins)
    return len(read), to_signed(found)


def add(covered: Sequence[int], of_step: Sequence[int], batch: Batch) -> list[int]:
    """Add a step to (samples, hash, replaced) of the epoch; empty if the epoch started without counting."""
    if batch.step_in_epoch == 0:
        return list(of_step)
    return [to_signed(a + b) for a, b in zip(covered, of_step, strict=True)] if covered else []


def prove(progress: Progress, plan: TrainPlan, epoch: int, runtime: Runtime, tracker: Tracker) -> dict[str, float]:
    """Return the "coverage/..." metrics after the last step of an epoch. All ranks.

    Each rank spends about 10 ns on each of its N / R samples and two small messages. With data.balance it also spends
    1 us on each of its share of the other epochs' draws, which are fewer than two passes of each class.

    Raises:
        CoverageError: on every rank, after the row of metrics is written: the samples are not those of the epoch.
    """
    [expected] = runtime.totals(digest_of_epoch(plan, epoch, part=runtime.rank, parts=runtime.world_size))  # all ranks
    expected = to_signed(expected)
    if progress.changed:
        tracker.say(f"epoch {epoch}: changed within ({', '.join(progress.changed)}), so its images were not checked")
        return {"coverage/changed": 1.0}
    if not progress.covered:
        tracker.say(
            f"epoch {epoch}: its images were not checked; an older version that did not count ran its first steps"
        )
        return {}
    samples, found, replaced = progress.covered
    num_expected = plan.num_draws - plan.left_out_per_epoch
    whole_epoch = (samples, found) == (num_expected, expected)
    row = {
        "coverage/samples": samples,
        "coverage/expected": num_expected,
        "coverage/replaced": replaced,
        "coverage/ok": float(whole_epoch),
    }
    if not whole_epoch:
        tracker.log(progress.step, row)
        begin = progress.step - plan.steps_per_epoch
        raise CoverageError(
            f"epoch {epoch} trained on {samples} samples with hash {found % 2**64:016x}; the manifest and the plan say "
            f"{num_expected} with hash {expected % 2**64:016x}",
            "some images were missed or used twice, so the model would not be the one that the settings describe",
            f"resume from a checkpoint of step {begin} or earlier (--resume PATH); if the error repeats, it is a bug "
            "of this program: please report it with log.txt",
        )
    return row


class StepHashes:
    """Writes steps.jsonl if run.record_steps is set. Lines after `resumed_step` are removed first.

    Args:
        resumed_step: number of optimizer steps done when the run starts.
    """

    def __init__(self, run: Run, runtime: Runtime, resumed_step: int) -> None:
        self._is_on, self._runtime = run.record_steps, runtime
        self._path = Path(run.out) / STEPS
        if self._is_on and runtime.is_main:
            roll_back(self._path, resumed_step)

    def add(self, step: int, batch: Batch, model: nn.Module) -> None:
        """Write the line of a step, after the optimizer's update. All ranks.

        Args:
            step: number of optimizer steps done, including this one.
            batch: this rank's part.
            model: not wrapped.
        """
        if not self._is_on:
            return
        own = batch.samples.tobytes(), b"".join(_digest(image) for image in batch.images_BCHW)
        parts = self._runtime.gather(own)  # all ranks; in the order of their lanes, as one rank would have them
        if self._runtime.is_main:
            samples, images = (hashlib.sha256(b"".join(column)) for column in zip(*parts, strict=True))
            row = {
                "step": step,
                "samples": samples.hexdigest()[:_HEX_DIGITS],
                "images": images.hexdigest()[:_HEX_DIGITS],
                "weights": weights_hash(model)[:_HEX_DIGITS],
            }
            with self._path.open("a", encoding="utf-8") as file:  # closed each time: a kill can cut this line only
                file.write(json.dumps(row) + "\n")


def weights_hash(model: nn.Module) -> str:
    """Return the sha256 of all parameters in their order."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(_digest(parameter.detach()))
    return found.hexdigest()


def _digest(tensor: torch.Tensor) -> bytes:
    """Return the sha256 of a tensor's numbers in the order of its axes, whatever its memory format."""
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).digest()
