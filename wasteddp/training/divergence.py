"""Detects divergence, and then stops the training, skips the step, or rolls back to the last good checkpoint.

A step has diverged if its loss is not finite, its gradient is not finite, or its loss is above train.exploding_loss
times ln K (the loss of a uniform guess over K classes). The same holds for the mean of the steps since the last row of
metrics. The test is a function of the settings and the step alone: it has no state, so every rank and every resumed run
decides alike. Gradients are averaged over the ranks before the test, so a NaN on one rank is a NaN on all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isfinite, log
from pathlib import Path

import torch
from torch import nn

from wasteddp.errors import DivergedError, storage
from wasteddp.model.networks import running_statistics
from wasteddp.settings import Settings, Train
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.checkpoint.reader import FOLDER, listed, step_of
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.optimizers import ScheduledOptimizer

_FINITE = ("train/loss", "train/grad_norm")


class RollbackRequest(BaseException):
    """Leaves the loop for `train_with_rollbacks`. A BaseException, because it must pass the handlers of errors."""

    def __init__(self, progress: Progress, reason: str) -> None:
        super().__init__(reason)
        self.progress, self.reason = progress, reason


@dataclass(frozen=True, slots=True)
class Rollback:
    """How a run starts again after a divergence; the defaults change nothing, for the first start."""

    rollbacks: int = 0
    lr_factor: float = 1.0
    from_step: int = -1

    def applied(self, progress: Progress) -> Progress:
        if self.rollbacks == 0:
            return progress
        return replace(progress, rollbacks=self.rollbacks, lr_factor=self.lr_factor)


@dataclass(frozen=True, slots=True)
class Update:
    """The result of an optimizer step, on the device."""

    norm: torch.Tensor | None  # of the averaged gradient before clipping, []; None: not computed
    skipped: torch.Tensor | None = None  # whether the step was skipped, bool []; None: steps are never skipped


class Guard:
    """Detects divergence in one run, on every rank.

    The device decides whether to skip a step, without a synchronization: a fused optimizer keeps weights and state
    unchanged if `found_inf` is 1, which is how torch's GradScaler skips steps too. With fp16 only the scaler decides.
    """

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        num_classes: int,
        progress: Progress,
    ) -> None:
        self._settings, self._runtime, self._model, self._optimizer = settings, runtime, model, optimizer
        self._limit = settings.train.exploding_loss * log(num_classes) or inf
        self.skips = settings.train.on_divergence == "skip"
        self._statistics = torch.zeros(0)
        self._in_a_row = torch.tensor(progress.skipped_in_a_row, device=runtime.device)
        self._longest = self._in_a_row.clone()
        needs_memory = self.skips or settings.model.unfreeze_every_epochs
        if needs_memory and settings.optimizer.name == "sgd" and settings.optimizer.momentum:
            self._begin_momentum()

    def _begin_momentum(self) -> None:
        """Set the momentum to zero, with which the first step computes the same as without a buffer.

        In its first step fused SGD allocates the buffer uninitialised, and a skipped step would leave it so. It also
        fails if only some parameters have a buffer, as after a stage is unfrozen.
        """
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                self._optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def begin_step(self) -> None:
        """Keep BatchNorm's running statistics, which the forward passes update."""
        if self.skips:
            self._statistics = _flat(running_statistics(self._model))

    def step(self, optimizer: ScheduledOptimizer, loss: torch.Tensor, *, needs_norm: bool) -> Update:
        """Clip the gradient and update the weights, unless the step is skipped. All ranks.

        Args:
            loss: this rank's mean loss over its part of the global batch.
            needs_norm: return the norm of the gradient even if nothing here depends on it.
        """
        norm = optimizer.clip(is_asked=needs_norm or self.skips)  # all ranks
        if not self.skips or norm is None:
            optimizer.step()
            return Update(norm)
        mean = self._runtime.sum(loss) / self._runtime.world_size  # all ranks
        skipped = ~(norm.isfinite() & (mean <= self._limit))  # NaN is not <= anything
        optimizer.step(found_inf=skipped.float())
        live = running_statistics(self._model)
        if live:
            kept = torch.where(skipped, self._statistics, _flat(live))
            parts = torch.split(kept, [tensor.numel() for tensor in live])
            torch._foreach_copy_(live, [part.view_as(tensor) for part, tensor in zip(parts, live, strict=True)])
        self._in_a_row = torch.where(skipped, self._in_a_row + 1, 0)
        self._longest = torch.maximum(self._longest, self._in_a_row)
        return Update(norm, skipped)

    def check(self, progress: Progress, row: dict[str, float], *, saves: bool) -> Progress:
        """Return the progress with the new count of skipped steps, and remove a NaN norm from the row. All ranks, with
        the same row.

        Raises:
            DivergedError: training diverged and must stop, or the limit of skipped steps or rollbacks is reached.
            RollbackRequest: training diverged and must roll back.
        """
        train = self._settings.train
        fp16 = self._runtime.accelerator.scaler is not None  # which lowers its scale after infinite gradients
        if self.skips:
            longest, in_a_row = int(self._longest), int(self._in_a_row)
            self._longest = self._in_a_row.clone()
            skipped = progress.skipped + int(row.pop("train/skipped", 0))
            progress = replace(progress, skipped=skipped, skipped_in_a_row=in_a_row)
            if longest >= train.max_skipped_in_a_row:
                raise self._diverged(
                    f"{longest} steps in a row were skipped, {skipped} in all (train.max_skipped_in_a_row)"
                )
        if (self.skips or fp16) and not isfinite(row.get("train/grad_norm", 0.0)):
            del row["train/grad_norm"]
        reason = self._reason(row) or (_unusable_weights(self._model) if saves else "")
        if not reason:
            return progress
        if train.on_divergence != "rollback" or progress.rollbacks >= train.max_rollbacks:
            raise self._diverged(reason, progress)
        raise RollbackRequest(progress, reason)

    def _reason(self, row: dict[str, float]) -> str:
        for name in _FINITE:
            if not isfinite(row.get(name, 0.0)):
                what = "mean loss since the last row of metrics" if name == "train/loss" else name
                return f"the {what} is {row[name]}"
        if row.get("train/loss", 0.0) > self._limit:
            return (
                f"the mean loss since the last row of metrics is {row['train/loss']:.4g}, above {self._limit:.4g} "
                f"(train.exploding_loss {self._settings.train.exploding_loss:g} x ln K)"
            )
        return ""

    def _diverged(self, reason: str, progress: Progress | None = None) -> DivergedError:
        settings = self._settings
        after = f", after {progress.rollbacks} rollbacks" if progress and progress.rollbacks else ""
        other = "; or set train.on_divergence to rollback" if settings.train.on_divergence == "stop" else ""
        return DivergedError(
            f"training diverged: {reason}{after}",
            "the next checkpoint would hold useless weights",
            f"lower optimizer.lr (now {settings.optimizer.lr:g}), use a longer warm-up, or set optimizer.clip_norm"
            f"{other}; the checkpoints in {settings.run.out} are from before the divergence",
        )


def train_with_rollbacks(train: Callable[[Rollback], int], out: Path, asked: Train, runtime: Runtime) -> int:
    """Call `train`, and after each `RollbackRequest` call it again with a smaller learning rate. All ranks.

    The run resumes from the newest checkpoint. If training diverges again before the next checkpoint, that checkpoint
    is removed and the run resumes from the one before it. If no checkpoint is left, the run starts at step 0.
    """
    rollback = Rollback()
    while True:
        try:
            return train(rollback)
        except RollbackRequest as back:
            folder = out / FOLDER
            runtime.accelerator.free_memory()  # frees the diverged model before the next one is built
            newest = _newest_step(folder, runtime)  # all ranks
            if rollback.rollbacks and newest == rollback.from_step:
                with runtime.sharing_errors():
                    if runtime.is_main and newest >= 0:
                        with storage("removing a checkpoint that diverges", folder):
                            shutil.rmtree(listed(folder)[-1])
                newest = _newest_step(folder, runtime)  # all ranks
            factor = back.progress.lr_factor * asked.rollback_lr_factor
            rollback = Rollback(back.progress.rollbacks + 1, factor, newest)
            runtime.say(
                f"diverged at step {back.progress.step}: {back.reason}; rolling back to "
                + (f"step {newest}" if newest >= 0 else "the beginning")
                + f" with {factor:g} of the learning rate (rollback {rollback.rollbacks} of at most "
                + f"{asked.max_rollbacks})"
            )


def _newest_step(folder: Path, runtime: Runtime) -> int:
    """Return the step of the newest checkpoint that rank 0 sees; -1 if there is no checkpoint. All ranks."""
    return int(runtime.gather(step_of(paths[-1]) if (paths := listed(folder)) else -1)[0])


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.zeros(0)


@torch.no_grad()
def _unusable_weights(model: nn.Module) -> str:
    """Return why these weights cannot be trained further, although the last loss was finite; '' if they can.

    One synchronization reads the norms of the tensors. In fp32 the norm also overflows for finite weights above about
    1e19, because their squares do, as would all that is computed from them.
    """
    tensors = [*model.parameters(), *running_statistics(model)]
    if bool(torch.stack(torch._foreach_norm(tensors)).isfinite().all()):
        return ""
    largest = float(torch.stack([tensor.abs().max() for tensor in tensors]).max())
    if isfinite(largest):
        return f"the weights are as large as {largest:.3g} after this step"
    return "the weights are not finite after this step"
