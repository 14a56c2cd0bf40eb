"""The training recipe of the settings: augmentation, targets, loss, learning rate and gradient clipping.

Legend: B images of a micro-batch, C = 3, H W pixels, K classes.
"""

from __future__ import annotations

from math import inf

import torch
from torch import nn

from wasteddp.data.augmentation.augment import Augment, Mixing
from wasteddp.data.batch import Batch
from wasteddp.model import resnet
from wasteddp.model.resnet import StochasticDepth
from wasteddp.settings import Settings
from wasteddp.training import schedule
from wasteddp.training.checkpoint.reader import Progress
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.optimization import losses, optimizers
from wasteddp.training.optimization.losses import Targets


class Recipe:
    """The recipe of one run, on every rank. It has no state: all results follow from the settings, step and samples.

    Args:
        model: not wrapped, on the device, with frozen stages.
    """

    def __init__(self, settings: Settings, runtime: Runtime, data: Inputs, model: nn.Module) -> None:
        self._settings, self._runtime, self._model = settings, runtime, model
        self._steps_per_epoch = data.plan.steps_per_epoch
        self._new_sizes = {epoch * self._steps_per_epoch for epoch, _ in schedule.changes(settings)[1:]}
        num_classes = len(data.manifest.classes)
        self.augment = Augment.of(settings.augment, settings.run.seed).on(runtime.device, runtime.say)
        self._mix = Mixing(settings.run.seed, num_classes, settings.augment.mixup, settings.augment.cutmix)
        counts, shares = data.train.samples_per_class, data.share_of_classes
        loss = losses.build(settings.train, counts, share_of_classes=shares).to(runtime.device)
        self.teacher = losses.teacher_of(settings, runtime, data.manifest.classes)  # all ranks
        self._loss = self.teacher.extend_loss(loss)
        depth = settings.model.stochastic_depth
        self._depth = StochasticDepth(model, depth, settings.run.seed) if depth else None
        self._frozen: str = settings.model.freeze  # in the current step

    def begin_step(self, optimizer: torch.optim.Optimizer, progress: Progress) -> float:
        """Set the network to training mode and the learning rate for a step, and return the rate."""
        model, epoch = self._settings.model, progress.step / self._steps_per_epoch
        self._frozen = resnet.frozen_at(model.freeze, model.unfreeze_every_epochs, epoch)
        resnet.train_mode(self._model, self._frozen)
        rate = optimizers.learning_rate(progress.step, self._settings, self._steps_per_epoch) * progress.lr_factor
        optimizers.set_learning_rate(optimizer, rate)
        if progress.step in self._new_sizes:
            self._runtime.watch.at("computing at a new image size", slow=True)  # the network may be compiled for it
        return rate

    def inputs(self, micro: Batch, epoch: int) -> tuple[torch.Tensor, Targets]:
        """Return (images, targets) of a micro-batch on the device.

        Returns:
            The augmented and mixed images, float32 [B, C, H, W]; the targets, int64 [B] or float [B, K], with the
            teacher's logits if there is a teacher.
        """
        images_BCHW = micro.images_BCHW.to(self._runtime.device, non_blocking=True)
        labels_B = micro.labels_B.to(self._runtime.device, non_blocking=True)
        if self._depth:
            self._depth.draw(micro.samples, epoch, self._runtime.device)
        images_BCHW = self.augment(images_BCHW, micro.samples, epoch)
        images_BCHW, targets = self._mix(images_BCHW, labels_B, micro.samples, epoch)
        return images_BCHW, self.teacher.add_logits(images_BCHW, targets)

    def loss(self, logits_BK: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Return this micro-batch's part of the rank's mean loss, [].

        The parts of a step sum to the mean over the rank's images, and DDP averages over the ranks.
        """
        images = self._runtime.micro_batch * self._runtime.accumulation
        total: torch.Tensor = self._loss(logits_BK, targets) / images
        return total

    def clip(self, *, is_asked: bool) -> torch.Tensor | None:
        """Clip the averaged gradient of the trained parameters, after the last backward pass. All ranks.

        Returns:
            The norm before clipping, []; None if it is neither requested nor needed. On a CPU it takes 1 % of a step.
        """
        resnet.drop_gradients(self._model, self._frozen)
        adaptive, limit = self._settings.optimizer.adaptive_clip, self._settings.optimizer.clip_norm
        if not adaptive and not limit and not is_asked:
            return None
        before = inf if adaptive else limit or inf
        norm: torch.Tensor = self._runtime.accelerator.clip_grad_norm_(self._model.parameters(), before)
        if adaptive:
            optimizers.clip_(self._model, adaptive)
            if limit:  # not with Accelerate, which would unscale the gradients again: GradScaler refuses that
                nn.utils.clip_grad_norm_(self._model.parameters(), limit)
        return norm
