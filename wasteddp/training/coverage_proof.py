"""Proves at the end of each epoch that all ranks together trained on each of its samples exactly once; with
data.balance, on each exactly as often as the epoch draws it.

What is counted is what the loader read for each row of a batch, not what the plan had asked for; that the bytes are
those of the sample's number, the reader has checked by sha256. What is expected comes from the number of samples in
the manifest and the few that the epoch leaves out, so an order that is no permutation is noticed too.

Balanced, what is proved is: (1) the epoch had as many draws as the quotas of the classes together; (2) added to what
the epochs before and after it draw of the passes that it shares with them (`data.balance`), what was read is each
sample of each class once for each of those passes. The sum over the draws does not depend on their order, lane, rank or
step. A shuffle that loses or doubles draws breaks (1) or (2), and so does a pass that is no permutation of its class:
the samples of whole passes come from the index, those of the other epochs from the rest of the pass, and neither from
the draws that were read. That each class has its quota follows from (2), as the parts of a pass are cut by it.

A damaged sample that was replaced counts as itself, its stand-in as nothing; how many these were is told beside.

steps.jsonl: what each step was made of, so that two runs that must be the same can be compared line by line.

With `run.record_steps`, a line a step: {"step": 7, "samples": hash of the sample numbers in the plan's order,
"images": hash of the decoded and cropped bytes, in the same order, "weights": hash of the parameters after the step}.
Samples and images are the same at any number of ranks; the weights are at the same number. Losses and learning rates
are in metrics.jsonl, for each step with train.log_every_steps 1. It costs the copy of the parameters to the host and a
hash of them at each step: for `wasteddp verify-resume` and tests, not for long runs.
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
from wasteddp.order.coverage import digest, digest_of_epoch, signed
from wasteddp.order.keyed_random import I64
from wasteddp.order.plan import PADDING, TrainPlan
from wasteddp.settings import Settings
from wasteddp.training.checkpoint.reader import Progress
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.tracking.tracker import Tracker, roll_back

STEPS = "steps.jsonl"
_HEX_DIGITS = 16


def count(batch: Batch, seed: int) -> tuple[int, int]:
    """(samples, hash) of one rank's batch. The ranks' add up."""
    read: I64 = batch.read_B[batch.read_B != PADDING]
    planned = np.array([item.sample for item in batch.damage], dtype=np.int64)
    stand_ins = np.array([item.replaced_by for item in batch.damage], dtype=np.int64)
    found = digest(seed, read) + digest(seed, planned) - digest(seed, stand_ins)
    return len(read), signed(found)


def add(covered: Sequence[int], of_step: Sequence[int], batch: Batch) -> list[int]:
    """(samples, hash, replaced) of the epoch with one step more; empty where it began without being counted."""
    if batch.step_in_epoch == 0:
        return list(of_step)
    return [signed(a + b) for a, b in zip(covered, of_step, strict=True)] if covered else []


def prove(progress: Progress, plan: TrainPlan, epoch: int, world: Runtime, tracker: Tracker) -> dict[str, float]:
    """All ranks, after the last step of an epoch: the "coverage/..." metrics.

    Costs each rank about 10 ns for each of its N / R samples, and two small messages; balanced, another 1 us for each
    of its part of the other epochs' draws, which are fewer than two passes of each class.

    Raises:
        CoverageError: on every rank, with the numbers, once the row of metrics is written.
    """
    [expected] = world.totals(digest_of_epoch(plan, epoch, part=world.rank, parts=world.world_size))  # all ranks
    expected = signed(expected)
    if progress.changed:
        tracker.say(f"epoch {epoch}: changed within ({', '.join(progress.changed)}), not proved")
        return {"coverage/changed": 1.0}
    if not progress.covered:
        tracker.say(f"epoch {epoch}: not proved, its first steps were taken by a version that did not count samples")
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
            "some images were lost and others perhaps seen twice, so the model is not the one that was asked for",
            f"go on from a checkpoint of step {begin} or before (--resume PATH); if it happens again it is a fault of "
            "the program: please report it with log.txt",
        )
    return row


class StepHashes:
    """Writes the lines; nothing if the setting is off. Lines after `resumed_step` are rolled back first.

    Args:
        resumed_step: the steps done when the run starts.
    """

    def __init__(self, settings: Settings, world: Runtime, resumed_step: int) -> None:
        self._is_on, self._world = settings.run.record_steps, world
        self._path = Path(settings.run.out) / STEPS
        if self._is_on and world.is_main:
            roll_back(self._path, resumed_step)

    def add(self, step: int, batch: Batch, model: nn.Module) -> None:
        """All ranks, after the optimizer's step.

        Args:
            step: optimizer steps done, this one included.
            batch: this rank's part.
            model: bare.
        """
        if not self._is_on:
            return
        own = batch.samples.tobytes(), b"".join(_digest(image) for image in batch.images_BCHW)
        parts = self._world.gather(own)  # all ranks, in the order of their lanes: together the order of one rank
        if self._world.is_main:
            samples, images = (hashlib.sha256(b"".join(column)) for column in zip(*parts, strict=True))
            row = {
                "step": step,
                "samples": samples.hexdigest()[:_HEX_DIGITS],
                "images": images.hexdigest()[:_HEX_DIGITS],
                "weights": weights_hash(model)[:_HEX_DIGITS],
            }
            with self._path.open("a", encoding="utf-8") as file:  # closed, so a kill can cut no line before this one
                file.write(json.dumps(row) + "\n")


def weights_hash(model: nn.Module) -> str:
    """sha256 of all parameters in their order."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(_digest(parameter.detach()))
    return found.hexdigest()


def _digest(tensor: torch.Tensor) -> bytes:
    """sha256 of a tensor's numbers in the order of its axes, however it lies in memory."""
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).digest()
