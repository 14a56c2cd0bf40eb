"""What a training step minimizes: the loss of the augmented and mixed images, with a teacher if there is one.

Legend: B images of a micro-batch, C = 3, H W pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import nn

from wasteddp.data.augmentation.augment import Augment, Mixing
from wasteddp.data.batch import Batch
from wasteddp.model.stochastic_depth import StochasticDepth
from wasteddp.settings import Settings
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.optimization import losses
from wasteddp.training.optimization.losses import Targets


class Objective:
    """The inputs and the loss of one run, on every rank. It has no state: all follows from settings and samples.

    Args:
        model: not wrapped, on the device, with frozen stages.
    """

    def __init__(self, settings: Settings, runtime: Runtime, data: Inputs, model: nn.Module) -> None:
        self._runtime = runtime
        num_classes = len(data.manifest.classes)
        mean, std = settings.model.mean, settings.model.std
        augment = Augment.from_settings(settings.augment, settings.run.seed, mean=mean, std=std)
        self.augment = augment.on(runtime.device, runtime.say)
        self._mix = Mixing(settings.run.seed, num_classes, settings.augment.mixup, settings.augment.cutmix)
        counts, shares = data.train.samples_per_class, data.share_of_classes
        loss = losses.build(settings.train, counts, share_of_classes=shares).to(runtime.device)
        self.teacher = losses.load_teacher(settings.train, runtime, data.manifest.classes, settings.model)  # all ranks
        self._loss = self.teacher.extend_loss(loss)
        depth = settings.model.stochastic_depth
        self._depth = StochasticDepth(model, depth, settings.run.seed) if depth else None

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
