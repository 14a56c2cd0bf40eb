"""What all classifiers have in common, how one is loaded, and the files that were made for its model. No torch.

A classifier gives batches of one shape, answers and unlikeness. It is loaded by the kind of its path: a run's or a
bundle's folder, or an ONNX file.

`model/features-<sha256>.safetensors` is the summary of training images' features. The card names its sha256, so the
card's own sha256 covers it. A bundle without it, as older versions of wasteddp wrote them, is complete too: its
predictions then do not have the unlikeness. New weights drop it: it belongs to the old ones.

VIEWS are those of test-time augmentation. Probabilities are averaged, not logits, so that a view in which the model is
uncertain counts for less. Source: Krizhevsky et al. 2012, "ImageNet Classification with Deep Convolutional Neural
Networks", section 4.1, which averages the softmax over crops and their mirror images. All four flips are used because
waste on a belt has no upright orientation.

Legend: B images, S side of the view, K classes, D features: the inputs of the network's last layer.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from wasteddp.data.decoding.decode import ImageHWC
from wasteddp.decisions.decide import Policy
from wasteddp.decisions.unlikeness import TrainingFeatures
from wasteddp.errors import BundleError
from wasteddp.files import read_regular, write_atomically
from wasteddp.inference.bundle import (
    CARD_NAME,
    BundleCard,
    find_bundle,
    read_card,
    refuse_other_weights,
    remove_old,
    replace_card,
)

if TYPE_CHECKING:
    from wasteddp.data.decoding.crop import View

Item = TypeVar("Item")
Outputs = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

Axes = tuple[int, ...]

# The axes of [B, C, H, W] that each view flips. The number of views is a power of two. Flipping the image swaps
# neighbours or halves of this list, so the sum in pairs is the same to the last bit for an image and its flipped copy.
VIEWS: dict[str, tuple[Axes, ...]] = {
    "none": ((),),
    "flip": ((), (3,)),
    "flips": ((), (3,), (2,), (2, 3)),
}

HOW_TO_ADD_FEATURES = "add them with: wasteddp features RUN"


class AnyClassifier(ABC):
    """A model that answers views, whatever computes it.

    Attributes:
        card: of its bundle.
        batch_size: images that are computed together.
        tta: name of the test-time augmentation.
        training: features of training images, for the unlikeness of images; None: it is not known.
        policy: bins and thresholds in the model's own file; None: it has none.
    """

    card: BundleCard
    batch_size: int
    tta: str
    training: TrainingFeatures | None
    policy: Policy | None = None
    _num_features: int

    @property
    @abstractmethod
    def how_to_view(self) -> View:
        """Converts an image file's bytes to a view."""

    @abstractmethod
    def view_pixels(self, pixels: ImageHWC) -> ImageHWC:
        """Turn upright RGB pixels, uint8 [H, W, 3], into the model's view: uint8 [S, S, 3]."""

    @abstractmethod
    def _one_batch(self, views: Sequence[ImageHWC]) -> Outputs:
        """Compute up to `batch_size` views as a batch of exactly `batch_size`: float32 [B, K] and [B, D]."""

    def view(self, data: bytes) -> ImageHWC:
        """Turn an image file's bytes into the model's view: uint8 [S, S, 3]. Safe to call from several threads.

        Raises:
            UndecodableError: see `decode_rgb`.
        """
        side = self.card.preprocessing.image_size_px
        out = np.empty((side, side, 3), np.uint8)
        self.how_to_view.fill(out, data, np.zeros(0))
        return out

    def batches(self, items: Iterable[Item]) -> Iterator[list[Item]]:
        """Yield lists of `batch_size` items; the last one may be shorter."""
        iterator = iter(items)
        while batch := list(islice(iterator, self.batch_size)):
            yield batch

    def probabilities(self, views: Sequence[ImageHWC]) -> npt.NDArray[np.float32]:
        """Return softmax(logits / temperature), or its mean over the flips of each view: float32 [B, K], rows sum to 1.

        Args:
            views: any number of images, uint8 [S, S, C].

        Raises:
            BundleError: the model's outputs are not finite.
        """
        return self.probabilities_and_features(views)[0]

    def answers(
        self, views: Sequence[ImageHWC]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64] | list[None]]:
        """Return `probabilities`, and the unlikeness of each image, a percentile (0 to 100); None if it is not known.

        Args and errors: see `probabilities`.
        """
        probabilities_BK, features_BD = self.probabilities_and_features(views)
        if self.training is None:
            return probabilities_BK, [None] * len(views)
        return probabilities_BK, self.training.percentiles(self.training.distances(features_BD))

    def probabilities_and_features(self, views: Sequence[ImageHWC]) -> Outputs:
        """Return `probabilities`, and float32 [B, D] from the same forward pass, of the images that are not flipped.

        Args and errors: see `probabilities`.
        """
        answers = [
            self._one_batch(views[begin : begin + self.batch_size]) for begin in range(0, len(views), self.batch_size)
        ]
        none = np.zeros((0, len(self.card.classes)), np.float32), np.zeros((0, self._num_features), np.float32)
        probabilities_BK, features_BD = (np.concatenate(parts) for parts in zip(none, *answers, strict=True))
        if not np.isfinite(probabilities_BK).all():
            raise BundleError(
                f"the model's outputs are not finite ({self.card.arch}, trained until step {self.card.trained.step})",
                "its predictions would be meaningless",
                "its training diverged: train again with a lower learning rate",
            )
        return probabilities_BK, features_BD

    def _filled_up(self, views: Sequence[ImageHWC]) -> npt.NDArray[np.uint8]:
        """Return uint8 [batch_size, S, S, 3]: the views, then black images."""
        side = self.card.preprocessing.image_size_px
        images_BHWC = np.zeros((self.batch_size, side, side, 3), np.uint8)
        images_BHWC[: len(views)] = views
        return images_BHWC


def is_onnx(path: str | Path) -> bool:
    return Path(path).suffix == ".onnx" and not Path(path).is_dir()


def load_classifier(
    path: str | Path, *, device: str = "auto", batch_size: int | None = None, tta: str = "none"
) -> AnyClassifier:
    """Load a model. torch is imported only for a folder.

    Raises:
        BundleError, LaunchError: see `Classifier.load` and `OnnxClassifier`.
    """
    if is_onnx(path):
        from wasteddp.inference.onnx_classifier import OnnxClassifier

        return OnnxClassifier(path, device=device, batch_size=batch_size, tta=tta)
    from wasteddp.inference.classifier import Classifier

    return Classifier.load(path, device=device, batch_size=batch_size, tta=tta)


def save_features(path: str | Path, features: TrainingFeatures, *, weights: str) -> BundleCard:
    """Write the features into a bundle in place of those that it has. Return its new card.

    Args:
        path: of the bundle, or of the run that holds it. Only one process may write it.
        weights: sha256 of the weights that computed the features.

    Raises:
        BundleError: there is no bundle, or it has other weights.
    """
    folder = find_bundle(path)
    card = read_card(folder)
    refuse_other_weights(folder, card, weights, "the features are")
    content = save(features.arrays())
    card = replace(card, hashes=replace(card.hashes, features=hashlib.sha256(content).hexdigest()))
    write_atomically(folder / card.file_names[-1], content)
    replace_card(folder, card)
    remove_old(folder, card)
    return card


def load_features(path: str | Path, card: BundleCard) -> TrainingFeatures | None:
    """Return the features that the card names; None if it names none.

    Raises:
        BundleError: the file is missing or damaged.
    """
    if not card.hashes.features:
        return None
    return read_features(find_bundle(path) / card.file_names[-1], card)


def read_features(file: Path, card: BundleCard) -> TrainingFeatures:
    """Return the features in a file that the card names.

    Raises:
        BundleError: the file is missing or damaged.
    """
    try:
        content = read_regular(file)
        if hashlib.sha256(content).hexdigest() != card.hashes.features:
            raise ValueError(f"its {len(content)} bytes do not have the sha256 that {CARD_NAME} names")
        return TrainingFeatures.of_arrays(load(content))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BundleError(
            f"{file} cannot be used: {getattr(error, 'strerror', None) or error}",
            "how unlike the training images an image is would be wrong or unknown",
            "copy the whole model folder again, or compute the features again: wasteddp features RUN",
        ) from error
