"""What happens when training diverges: it stops, skips the step, or goes back to the last good checkpoint.

Diverged has a step, or the mean of the steps since the last row of metrics, whose loss is no finite number or above
train.exploding_loss times ln K (the loss of a guess that gives each of K classes the same chance), or whose gradient is
not finite. That is a function of the settings and of the step alone: nothing is remembered, and every rank and every
resumed run judges alike. Gradients are averaged over the ranks before they are looked at: a NaN of one is one of all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isfinite, log
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wasteddp.errors import DivergedError, storage
from wasteddp.model.resnet import running_statistics
from wasteddp.settings import Settings
from wasteddp.training.checkpoint.reader import FOLDER, Progress, listed, step_of
from wasteddp.training.distributed.runtime import Runtime

_FINITE = ("train/loss", "train/grad_norm")


class RollBack(BaseException):
    """No error: the way from the loop to `rolling_back`, past what handles errors."""

    def __init__(self, progress: Progress, reason: str) -> None:
        super().__init__(reason)
        self.progress, self.reason = progress, reason


@dataclass(frozen=True, slots=True)
class Retreat:
    """Where and how a run begins again after it diverged; the first beginning of all is one without a change."""

    rollbacks: int = 0
    lr_factor: float = 1.0
    from_step: int = -1

    def applied(self, progress: Progress) -> Progress:
        if self.rollbacks == 0:
            return progress
        return replace(progress, rollbacks=self.rollbacks, lr_factor=self.lr_factor)


class Guard:
    """Of one run, on every rank.

    Skipping is decided on the device, without a look from the host: fused optimizers leave weights and their state as
    they are where `found_inf` is 1, which is also how torch's GradScaler skips. Under fp16 that scaler decides alone.
    """

    def __init__(
        self,
        settings: Settings,
        world: Runtime,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        num_classes: int,
        progress: Progress,
    ) -> None:
        self._settings, self._world, self._model, self._optimizer = settings, world, model, optimizer
        self._limit = settings.train.exploding_loss * log(num_classes) or inf
        self.skips = settings.train.on_divergence == "skip"
        self._statistics = torch.zeros(0)
        self._in_a_row = torch.tensor(progress.skipped_in_a_row, device=world.device)
        self._longest = self._in_a_row.clone()
        needs_memory = self.skips or settings.model.unfreeze_every_epochs
        if needs_memory and settings.optimizer.name == "sgd" and settings.optimizer.momentum:
            self._begin_momentum()

    def _begin_momentum(self) -> None:
        """Zeros, from which the first step makes what it would make from nothing: torch gives a fused SGD's first step
        memory that was never written, and a skipped step leaves it so; and it fails where only some have one, as when a
        stage is unfrozen."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                self._optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def begin_step(self) -> None:
        """Before the forward passes, whose images move BatchNorm's running statistics."""
        if self.skips:
            self._statistics = _flat(running_statistics(self._model))

    def step(self, stepper: Any, loss: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor | None:
        """All ranks: the optimizer's step, unless it is skipped; if it may be, whether it was: bool [] on the device.

        Args:
            stepper: the optimizer as Accelerate wraps it.
            loss: of this rank, over its part of the global batch.
            norm: of the averaged gradient; needed where steps may be skipped.
        """
        if not self.skips or norm is None:
            stepper.step()
            return None
        mean = self._world.sum(loss) / self._world.world_size  # all ranks
        skipped = ~(norm.isfinite() & (mean <= self._limit))  # NaN is not <= anything
        self._optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        stepper.step()
        live = running_statistics(self._model)
        if live:
            kept = torch.where(skipped, self._statistics, _flat(live))
            parts = torch.split(kept, [tensor.numel() for tensor in live])
            torch._foreach_copy_(live, [part.view_as(tensor) for part, tensor in zip(parts, live, strict=True)])
        self._in_a_row = torch.where(skipped, self._in_a_row + 1, 0)
        self._longest = torch.maximum(self._longest, self._in_a_row)
        return skipped

    def judge(self, progress: Progress, row: dict[str, float], *, saves: bool) -> Progress:
        """All ranks, with the same row: the progress with its count of skipped steps. Takes NaN out of the row.

        Raises:
            DivergedError: training diverged, and is to stop, or has skipped or gone back often enough.
            RollBack: it diverged, and goes back.
        """
        train = self._settings.train
        fp16 = self._world.accelerator.scaler is not None  # whose scaler meets infinite gradients and lowers its scale
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
        raise RollBack(progress, reason)

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
        after = f", after going back {progress.rollbacks} times" if progress and progress.rollbacks else ""
        other = "; train.on_divergence: rollback goes back by itself" if settings.train.on_divergence == "stop" else ""
        return DivergedError(
            reason + after,
            "every weight would be lost by the next checkpoint",
            f"lower optimizer.lr (it is {settings.optimizer.lr:g}), warm up for longer, or set optimizer.clip_norm; "
            f"the checkpoints in {settings.run.out} are from before{other}",
        )


def rolling_back(train: Callable[[Retreat], int], settings: Settings, world: Runtime) -> int:
    """All ranks: trains; after a `RollBack` again, from the newest checkpoint and with smaller learning rates.

    A checkpoint from which training diverges again before it saves another is removed: it is not good, and the one
    before it is next. Where none is left, the run begins again.
    """
    retreat = Retreat()
    while True:
        try:
            return train(retreat)
        except RollBack as back:
            folder = Path(settings.run.out) / FOLDER
            world.accelerator.free_memory()  # or the model that diverged would stay beside the next
            newest = _newest_step(folder, world)  # all ranks
            if retreat.rollbacks and newest == retreat.from_step:
                with world.together():
                    if world.is_main and newest >= 0:
                        with storage("removing a checkpoint that diverges", folder):
                            shutil.rmtree(listed(folder)[-1])
                newest = _newest_step(folder, world)  # all ranks
            factor = back.progress.lr_factor * settings.train.rollback_lr_factor
            retreat = Retreat(back.progress.rollbacks + 1, factor, newest)
            world.say(
                f"diverged at step {back.progress.step}: {back.reason}; going back to "
                + (f"step {newest}" if newest >= 0 else "the beginning")
                + f" with {factor:g} of the learning rate ({retreat.rollbacks} of {settings.train.max_rollbacks} times)"
            )


def _newest_step(folder: Path, world: Runtime) -> int:
    """All ranks: of the newest checkpoint as rank 0 sees it; -1 where there is none."""
    return int(world.gather(step_of(paths[-1]) if (paths := listed(folder)) else -1)[0])


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.zeros(0)


@torch.no_grad()
def _unusable_weights(model: nn.Module) -> str:
    """Why nothing can be trained from these weights, though the loss that led to them was fine; '' where it can.

    One look at the device: the tensors' norms. In fp32 these are no numbers either for weights above some 1e19, whose
    squares are too large, and so is all that is computed from them.
    """
    tensors = [*model.parameters(), *running_statistics(model)]
    if bool(torch.stack(torch._foreach_norm(tensors)).isfinite().all()):
        return ""
    largest = float(torch.stack([tensor.abs().max() for tensor in tensors]).max())
    if isfinite(largest):
        return f"the weights are as large as {largest:.3g} after this step"
    return "the weights are no finite numbers after this step"
