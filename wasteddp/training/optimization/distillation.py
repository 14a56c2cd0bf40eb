"""Knowledge distillation: what a trained model answers is learned beside the labels.

Legend: B images of a micro-batch, C = 3, H W pixels, K classes, T a temperature, w the teacher's weight.

The teacher is a bundle: frozen, in evaluation mode, in the run's precision. It sees the images that the student sees,
cropped, augmented and mixed alike and at their size, so that its answers are about them. (Source: Beyer et al. 2022,
"Knowledge distillation: A good teacher is patient and consistent".) Its logits are taken as they are, without the
temperature that calibration may have put on its card: so they are a function of its weights' file alone, whose sha256
is in the run's lineage, and a run goes on under another teacher only if that is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from wasteddp.data.decoding.crop import MEAN_RGB, STD_RGB
from wasteddp.errors import BundleError
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.classifier import load_network
from wasteddp.settings import Settings
from wasteddp.training.distributed.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Taught:
    """Targets, int64 [B] or float [B, K], and the teacher's logits for the same images, float32 [B, K]."""

    targets: torch.Tensor
    logits_BK: torch.Tensor


Targets = torch.Tensor | Taught


class NoTeacher:
    """For a run without one: targets and loss stay as they are."""

    sha256 = ""
    words = ""

    def asked(self, images_BCHW: torch.Tensor, targets: torch.Tensor) -> Targets:
        return targets

    def completed(self, loss: nn.Module) -> nn.Module:
        return loss


@dataclass(frozen=True, slots=True)
class Teacher:
    """Of one run, on every rank.

    Args:
        network: on the device, frozen, in evaluation mode.
        autocast: makes the context of the run's precision.
        sha256: of its weights.
        words: what it is, for the log, to be put after what the student is.
    """

    network: nn.Module
    autocast: Callable[[], AbstractContextManager[None]]
    weight: float
    temperature: float
    sha256: str
    words: str

    def asked(self, images_BCHW: torch.Tensor, targets: torch.Tensor) -> Targets:
        """The targets, and what it says. Before the student's forward pass, whose activations fill the memory.

        Args:
            images_BCHW: float32, normalised, on the device.
        """
        with torch.no_grad(), self.autocast():
            return Taught(targets, self.network(images_BCHW).float())

    def completed(self, loss: nn.Module) -> nn.Module:
        """A loss of (logits, targets) -> the loss of (logits, what `asked` gives)."""
        return Distilled(loss, self.weight, self.temperature)


class Distilled(nn.Module):
    """(1 - w) * loss(student, targets) + w * T^2 * KL(teacher || student), both softened by T; summed over the images.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2: the slopes of the
    softened part go down with T^2, which the factor makes up for. It is of the raw logits, those in use; logit
    adjustment is for the labels alone. So a teacher that favours frequent classes passes that on.
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


def teacher_of(settings: Settings, world: Runtime, classes: Sequence[str]) -> NoTeacher | Teacher:
    """All ranks: the teacher that the settings name; with a weight of 0 it is as if they named none.

    Args:
        classes: of the run, in the order of its network's outputs.

    Raises:
        BundleError: on every rank: see `load_network`; or it answers with other classes, or sees images otherwise.
    """
    asked = settings.train
    if not asked.teacher or not asked.teacher_weight:
        return NoTeacher()
    with world.together():
        card, network = load_network(asked.teacher)
        _refuse_other_questions(asked.teacher, card, classes)
    layout = torch.channels_last if settings.model.channels_last else torch.contiguous_format
    network = network.to(device=world.device, memory_format=layout)  # type: ignore[call-overload]
    trained = card.trained
    words = (
        f", taught by {asked.teacher} ({card.arch}, {trained.metric} {trained.value:.2%} at step {trained.step}, "
        f"{card.hashes.weights[:12]}) with weight {asked.teacher_weight:g} at temperature {asked.teacher_temperature:g}"
    )
    return Teacher(
        network,
        world.accelerator.autocast,
        weight=asked.teacher_weight,
        temperature=asked.teacher_temperature,
        sha256=card.hashes.weights,
        words=words,
    )


def _refuse_other_questions(path: str, card: BundleCard, classes: Sequence[str]) -> None:
    if card.classes != tuple(classes):
        raise BundleError(
            f"the teacher {path} answers with the classes {', '.join(card.classes)}, and the run's are "
            f"{', '.join(classes)}, in this order",
            "the student would learn the answers to other questions",
            "name a model that was trained on the same classes, or set train.teacher to ''",
        )
    seen = card.preprocessing
    if (seen.mean, seen.std) != (MEAN_RGB, STD_RGB):
        raise BundleError(
            f"the teacher {path} knows images of mean {list(seen.mean)} and std {list(seen.std)}, and the run's have "
            f"{list(MEAN_RGB)} and {list(STD_RGB)}",
            "it would see other colours than it knows",
            "name a model that was trained with this program, or set train.teacher to ''",
        )
