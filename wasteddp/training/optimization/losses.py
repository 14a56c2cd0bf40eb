"""What is minimised: cross-entropy or focal loss, weighted or adjusted for classes of unlike size.

Legend: B images of a micro-batch, K classes, p_k the softmax of the logits, t_k the target of a class: 1 for the true
one, shared out by MixUp, CutMix and label smoothing.

Every loss is the sum over a micro-batch, to be divided by the number of images: the mean that torch takes with class
weights divides by the weights' sum, which differs between micro-batches, so parts would not add up.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wasteddp.settings import Train

# One of the four that Cui et al. 2019 tried (0.9, 0.99, 0.999, 0.9999). The images of a class then count as
# 1 / (1 - b) = 1000 at most: 100 as 95, 500 as 394, 10,000 as 1000. So it is for sets of hundreds a class and more;
# with less it is inverse_frequency nearly.
_EFFECTIVE_NUMBER_BETA = 0.999


def build(settings: Train, samples_per_class: npt.ArrayLike, *, share_of_classes: npt.ArrayLike) -> nn.Module:
    """The loss that the settings ask for: (logits [B, K], targets int64 [B] or float [B, K]) -> [], the sum.

    Args:
        samples_per_class: of the training split, [K].
        share_of_classes: of what is drawn from it, [K], each above 0, of sum 1.
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
    """Sum over images and classes of -w_k (1 - p_k)^gamma t_k ln p_k: what is right already counts less.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5, with the softmax in the place of the
    sigmoid and the class weights in that of alpha. There t_k is 0 or 1; for soft targets each class of them is a term
    of its own, as in cross-entropy, which this is for gamma 0.

    Args:
        gamma: 0 or more.
        weight_K: of each class, [K]; None: all 1.
        label_smoothing: part of each target that is shared out evenly, as `nn.CrossEntropyLoss` does it.
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
        # expm1: 1 - p has no digits left where p is nearly 1. The clamp: at 0 a power below 1 has no finite slope.
        missed_BK = (-torch.expm1(log_p_BK)).clamp_min(torch.finfo(log_p_BK.dtype).tiny)
        terms_BK = missed_BK**self._gamma * targets * log_p_BK
        if self.weight_K is not None:
            terms_BK = terms_BK * self.weight_K
        return -terms_BK.sum()


class LogitAdjusted(nn.Module):
    """A loss of logits + tau ln(share of their class), so that the raw logits, which are what is evaluated and used,
    favour no class for being frequent.

    Source: Menon et al. 2021, "Long-tail learning via logit adjustment", eq. 10. With tau 1 cross-entropy on these is
    consistent for the mean recall of the classes.

    Args:
        share_of_classes: of the images that are really drawn, [K].
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
    """Loss weight of each class, float32 [K], of mean 1 over the training samples; None for "none".

    inverse_frequency: 1 / n. effective_number: (1 - b) / (1 - b^n) with b = 0.999.
    Source: Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", eq. 2.
    """
    if name == "none":
        return None
    n = np.asarray(samples_per_class, dtype=np.float64)
    beta = _EFFECTIVE_NUMBER_BETA
    # expm1 and log1p: 1 - b^n loses digits for small n
    weights = 1 / n if name == "inverse_frequency" else (1 - beta) / -np.expm1(n * np.log(beta))
    scaled: npt.NDArray[np.float32] = (weights * n.sum() / (weights * n).sum()).astype(np.float32)
    return scaled
