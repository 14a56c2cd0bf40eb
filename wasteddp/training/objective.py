"""What a training step minimizes: the loss of the augmented and mixed images, with a teacher if there is one.

The losses: cross-entropy or focal loss, class weights, logit adjustment, and knowledge distillation.

Legend: B images of a micro-batch, C = 3, H W pixels, K classes, p_k the softmax of the logits, t_k the target of a
class (1 for the true class, or distributed by MixUp, CutMix and label smoothing), T the temperature and w the weight of
a teacher.

Every loss is the sum over a micro-batch; the caller divides it by the number of images. With class weights torch's mean
would divide by the sum of the weights, which differs between micro-batches, so the parts of a step would not add up.

Knowledge distillation learns the predictions of a trained model in addition to the labels. The teacher is a bundle:
frozen, in evaluation mode, in the run's precision. It sees the same images as the student, with the same crop,
augmentation, mixing and size, so its predictions are about these images. (Source: Beyer et al. 2022, "Knowledge
distillation: A good teacher is patient and consistent".) Its raw logits are used, without the temperature that a
calibration may have added to its card. So they depend only on the file of its weights. The sha256 of this file is in
the run's lineage: a run resumes with another teacher only if that change is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wasteddp.data.augmentation.augment import Augment, Mixing
from wasteddp.data.batch import Batch
from wasteddp.errors import BundleError, joined
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.classifier import load_network
from wasteddp.model.stochastic_depth import StochasticDepth
from wasteddp.settings import Model, Settings, Train
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime

# One of the four values that Cui et al. 2019 tried (0.9, 0.99, 0.999, 0.9999). The effective number of images of a
# class is then 1 / (1 - b) = 1000 at most: 95 of 100, 394 of 500, 1000 of 10,000. It is useful with hundreds of images
# per class and more; with fewer it is nearly the same as inverse_frequency.
_EFFECTIVE_NUMBER_BETA = 0.999


def build_loss(settings: Train, samples_per_class: npt.ArrayLike, *, share_of_classes: npt.ArrayLike) -> nn.Module:
    """Build the loss of the settings: (logits [B, K], targets int64 [B] or float [B, K]) -> sum over the images, [].

    Args:
        samples_per_class: number of training samples of each class, [K].
        share_of_classes: fraction of each class in the drawn samples, [K], each above 0, with sum 1.
    """
    weights = class_weights(settings.class_weighting, samples_per_class)
    weight_K = None if weights is None else torch.from_numpy(weights)
    loss: nn.Module
    if settings.loss == "focal" and settings.focal_gamma > 0:
        loss = FocalLoss(settings.focal_gamma, weight_K=weight_K, label_smoothing=settings.label_smoothing)
    else:
        loss = nn.CrossEntropyLoss(weight=weight_K, label_smoothing=settings.label_smoothing, reduction="sum")
    if settings.logit_adjustment:
        loss = LogitAdjusted(loss, settings.logit_adjustment, share_of_classes)
    return loss


class FocalLoss(nn.Module):
    """Sum over images and classes of -w_k (1 - p_k)^gamma t_k ln p_k, which gives less weight to easy images.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5, with the softmax instead of the sigmoid and
    class weights instead of alpha. There t_k is 0 or 1. With soft targets each class is a term, as in cross-entropy,
    which is the case gamma 0.

    Args:
        gamma: 0 or more.
        weight_K: weight of each class, [K]; None: all 1.
        label_smoothing: fraction of each target that is distributed evenly, as in `nn.CrossEntropyLoss`.
    """

    weight_K: torch.Tensor | None

    def __init__(self, gamma: float, *, weight_K: torch.Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self._gamma, self._label_smoothing = gamma, label_smoothing
        self.register_buffer("weight_K", weight_K)

    def forward(self, logits_BK: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        num_classes = logits_BK.shape[1]
        log_p_BK = logits_BK.log_softmax(1)
        if not targets.is_floating_point():
            targets = nn.functional.one_hot(targets, num_classes).to(log_p_BK.dtype)
        if self._label_smoothing:
            targets = targets * (1 - self._label_smoothing) + self._label_smoothing / num_classes
        # expm1 avoids cancellation in 1 - p near p = 1. The clamp: a power below 1 has an infinite slope at 0.
        missed_BK = (-torch.expm1(log_p_BK)).clamp_min(torch.finfo(log_p_BK.dtype).tiny)
        terms_BK = missed_BK**self._gamma * targets * log_p_BK
        if self.weight_K is not None:
            terms_BK = terms_BK * self.weight_K
        return -terms_BK.sum()


class LogitAdjusted(nn.Module):
    """A loss of logits + tau ln(fraction of the class). Evaluation and prediction use the raw logits, which then do not
    favour frequent classes.

    Source: Menon et al. 2021, "Long-tail learning via logit adjustment", eq. 10. With tau 1, cross-entropy on the
    adjusted logits is consistent for the mean recall of the classes.

    Args:
        share_of_classes: fraction of each class in the drawn samples, [K].
    """

    shift_K: torch.Tensor

    def __init__(self, loss: nn.Module, tau: float, share_of_classes: npt.ArrayLike) -> None:
        super().__init__()
        self._loss = loss
        shift = tau * np.log(np.asarray(share_of_classes, dtype=np.float64))
        self.register_buffer("shift_K", torch.from_numpy(shift.astype(np.float32)))

    def forward(self, logits_BK: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self._loss(logits_BK + self.shift_K, targets)
        return total


def class_weights(name: str, samples_per_class: npt.ArrayLike) -> npt.NDArray[np.float32] | None:
    """Return the loss weight of each class, float32 [K], with mean 1 over the training samples; None for "none".

    inverse_frequency: 1 / n. effective_number: (1 - b) / (1 - b^n) with b = 0.999.
    Source: Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", eq. 2.
    """
    if name == "none":
        return None
    n = np.asarray(samples_per_class, dtype=np.float64)
    beta = _EFFECTIVE_NUMBER_BETA
    # expm1: 1 - b^n loses digits for small n
    weights = 1 / n if name == "inverse_frequency" else (1 - beta) / -np.expm1(n * np.log(beta))
    scaled: npt.NDArray[np.float32] = (weights * n.sum() / (weights * n).sum()).astype(np.float32)
    return scaled


@dataclass(frozen=True, slots=True)
class Taught:
    """Targets, int64 [B] or float [B, K], and the teacher's logits for the same images, float32 [B, K]."""

    targets: torch.Tensor
    logits_BK: torch.Tensor


Targets = torch.Tensor | Taught


class NoTeacher:
    """For a run without a teacher: it changes neither the targets nor the loss."""

    sha256 = ""
    words = ""

    def add_logits(self, images_BCHW: torch.Tensor, targets: torch.Tensor) -> Targets:
        return targets

    def extend_loss(self, loss: nn.Module) -> nn.Module:
        return loss


@dataclass(frozen=True, slots=True)
class Teacher:
    """The teacher of one run, on every rank.

    Args:
        network: on the device, frozen, in evaluation mode.
        autocast: returns the context of the run's precision.
        sha256: of its weights.
        words: a description for the log, to be appended to that of the student.
    """

    network: nn.Module
    autocast: Callable[[], AbstractContextManager[None]]
    weight: float
    temperature: float
    sha256: str
    words: str

    def add_logits(self, images_BCHW: torch.Tensor, targets: torch.Tensor) -> Targets:
        """Return the targets with the teacher's logits. Call it before the student's forward pass, whose activations
        fill the memory.

        Args:
            images_BCHW: float32, normalised, on the device.
        """
        with torch.no_grad(), self.autocast():
            return Taught(targets, self.network(images_BCHW).float())

    def extend_loss(self, loss: nn.Module) -> nn.Module:
        """Return the loss of (logits, result of `add_logits`) that combines `loss` with the distillation."""
        return Distilled(loss, self.weight, self.temperature)


class Distilled(nn.Module):
    """(1 - w) * loss(student, targets) + w * T^2 * KL(teacher || student), with both softened by T; summed over images.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2: the gradients of
    the softened part scale with 1 / T^2, which the factor compensates. The KL term uses the raw logits; logit
    adjustment affects only the labels' term. So a student inherits its teacher's preference for frequent classes.
    """

    def __init__(self, loss: nn.Module, weight: float, temperature: float) -> None:
        super().__init__()
        self._loss, self._weight, self._temperature = loss, weight, temperature

    def forward(self, logits_BK: torch.Tensor, taught: Taught) -> torch.Tensor:
        student_BK = (logits_BK / self._temperature).log_softmax(1)
        teacher_BK = (taught.logits_BK / self._temperature).log_softmax(1)
        distance = nn.functional.kl_div(student_BK, teacher_BK, reduction="sum", log_target=True)
        total: torch.Tensor = (1 - self._weight) * self._loss(logits_BK, taught.targets)
        return total + self._weight * self._temperature**2 * distance


def load_teacher(settings: Settings, runtime: Runtime, classes: Sequence[str]) -> NoTeacher | Teacher:
    """Load the teacher of the settings; with train.teacher_weight 0 there is no teacher. All ranks.

    Args:
        classes: the classes of the run, in the order of its network's outputs.

    Raises:
        BundleError: on every rank: see `load_network`; or its classes or its normalisation differ from the run's.
    """
    asked, student = settings.train, settings.model
    if not asked.teacher or not asked.teacher_weight:
        return NoTeacher()
    with runtime.sharing_errors():
        card, network = load_network(asked.teacher)
        _refuse_unfit_teacher(asked.teacher, card, classes, student)
    layout = torch.channels_last if student.channels_last else torch.contiguous_format
    network = network.to(device=runtime.device, memory_format=layout)  # type: ignore[call-overload]
    theirs, ours = card.preprocessing.image_size_px, settings.data.eval_size_px
    if theirs != ours:
        runtime.say(
            f"the teacher was evaluated at {theirs} px, this run at {ours} px: it sees the images of this run, and may "
            "know less of objects of another size; a teacher that learned at this run's size teaches better"
        )
    trained = card.trained
    words = (
        f", taught by {asked.teacher} ({card.arch}, {trained.metric} {trained.value:.2%} at step {trained.step}, "
        f"{card.hashes.weights[:12]}) with weight {asked.teacher_weight:g} at temperature {asked.teacher_temperature:g}"
    )
    return Teacher(
        network,
        runtime.accelerator.autocast,
        weight=asked.teacher_weight,
        temperature=asked.teacher_temperature,
        sha256=card.hashes.weights,
        words=words,
    )


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
        loss = build_loss(settings.train, counts, share_of_classes=shares).to(runtime.device)
        self.teacher = load_teacher(settings, runtime, data.manifest.classes)  # all ranks
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


def _refuse_unfit_teacher(path: str, card: BundleCard, classes: Sequence[str], student: Model) -> None:
    if card.classes != tuple(classes):
        raise BundleError(
            f"the teacher {path} predicts the classes {joined(card.classes)}, and the run's are "
            f"{joined(classes)}, in this order",
            "the student would learn the probabilities of other classes",
            "name a model that was trained on the same classes, or set train.teacher to ''",
        )
    seen = card.preprocessing
    if (seen.mean, seen.std) != (student.mean, student.std):
        raise BundleError(
            f"the teacher {path} expects images normalised with mean {list(seen.mean)} and std {list(seen.std)}, "
            f"and the run uses {list(student.mean)} and {list(student.std)}",
            "its predictions would be wrong",
            "set model.mean and model.std to those of the teacher, or train.teacher to ''",
        )
