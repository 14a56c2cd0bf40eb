"""A trained model in a Python program.

Legend: N inputs, D features: the inputs of the network's last layer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from wasteddp.data.decoding.decode import ImageHWC, UndecodableError, rgb_of
from wasteddp.data.decoding.formats import IN_WORDS
from wasteddp.decisions.decide import Policy
from wasteddp.errors import SourceError
from wasteddp.files import expand_home, read_regular
from wasteddp.inference.any_classifier import AnyClassifier, load_classifier
from wasteddp.inference.metrics import as_float
from wasteddp.inference.policy_files import load_policy
from wasteddp.inference.prediction_files import decisions_of
from wasteddp.parallel import in_order, num_usable_cores

Input: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[np.uint8]"
_ONE = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)

_LOCKS = [threading.Lock() for _ in range(64)]  # of PIL images, by their address


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says about one image.

    Attributes:
        class_name: the most probable class.
        probability: its calibrated probability, 0 to 1.
        probabilities: of each class, in the order of `Model.classes`; their sum is 1.
        bin: that the class belongs in; None: the model knows no bins.
        decision: bin, or "person", that the policy chooses; None: there is no policy.
        why: the rule that decided: "hazard" (its bin, or a person), "cost" or "doubt" (a person); else "".
        unlikeness: percentile, 0 to 100, of how unlike the training images it is; None: not known.
    """

    class_name: str
    probability: float
    probabilities: Mapping[str, float]
    bin: str | None = None
    decision: str | None = None
    why: str = ""
    unlikeness: float | None = None


class Model:
    """A trained model, ready to answer. `wasteddp.load` creates it. Threads may share it; they compute in turn."""

    def __init__(self, classifier: AnyClassifier, policy: Policy | None = None) -> None:
        self._classifier, self._policy = classifier, policy or classifier.policy

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classifier.card.classes

    @property
    def bins(self) -> Mapping[str, str]:
        """The bin of each class; empty if the model knows none."""
        return MappingProxyType(dict(self._classifier.card.bins))

    @property
    def arch(self) -> str:
        return self._classifier.card.arch

    @property
    def weights_sha256(self) -> str:
        return self._classifier.card.hashes.weights

    def predict(self, inputs: Input | Iterable[Input]) -> list[Answer]:
        """Return one answer for each input, in order. They are the same bits as those of `wasteddp predict`.

        Args:
            inputs: paths of image files, bytes of image files, PIL images, or uint8 arrays of RGB pixels [H, W, 3];
                one of them, or any number in an iterable, also an array [N, H, W, 3]. Paths and bytes are best: a large
                JPEG is decoded at a fraction of its size, and its decoded pixels give probabilities that differ a
                little.

        Raises:
            SourceError: an input is not an image, or cannot be read; its number and name are in the message.
            BundleError: the model's outputs are not finite.
        """
        return [answer for views in self._batches(inputs) for answer in self._answers(views)]

    def features(self, inputs: Input | Iterable[Input]) -> npt.NDArray[np.float32]:
        """Return the inputs of the network's last layer: float32 [N, D]. Args and errors: see `predict`."""
        classifier = self._classifier
        parts = [classifier.probabilities_and_features(views)[1] for views in self._batches(inputs)]
        return np.concatenate(parts or [classifier.probabilities_and_features([])[1]])

    def _batches(self, inputs: Input | Iterable[Input]) -> Iterator[list[ImageHWC]]:
        is_one = isinstance(inputs, _ONE) or (isinstance(inputs, np.ndarray) and inputs.ndim < 4)
        is_one |= hasattr(inputs, "read") or not isinstance(inputs, Iterable)  # `_view` refuses these
        several = cast(Iterable[Any], [inputs] if is_one else inputs)
        views = in_order(partial(_view, self._classifier), enumerate(several), workers=num_usable_cores())
        yield from self._classifier.batches(views)

    def _answers(self, views: Sequence[ImageHWC]) -> Iterator[Answer]:
        card = self._classifier.card
        probabilities_BK, unlike_B = self._classifier.answers(views)
        decided_B = decisions_of(self._policy, probabilities_BK) if self._policy else [None] * len(views)
        for shares_K, unlike, decided in zip(probabilities_BK, unlike_B, decided_B, strict=True):
            shares = dict(zip(card.classes, map(as_float, shares_K), strict=True))
            name = card.classes[int(shares_K.argmax())]
            yield Answer(
                class_name=name,
                probability=shares[name],
                probabilities=MappingProxyType(shares),
                bin=card.bins.get(name),
                decision=decided.bin if decided else None,
                why=decided.why if decided else "",
                unlikeness=None if unlike is None else float(unlike),
            )


def load(
    path: str | os.PathLike[str],
    *,
    policy: str | os.PathLike[str] | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    tta: str = "none",
) -> Model:
    """Load a trained model.

    Args:
        path: folder of a run or of its model, or an .onnx file of `wasteddp export`, which needs no torch.
        policy: policy.json of `wasteddp evaluate --bins`, for decisions; None: that of an .onnx file, if it has one.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.
        batch_size: images that are computed together; None: 8 on a CPU, 64 on a GPU.
        tta: none, flip or flips: the mean over the image and its flips.

    Raises:
        BundleError: there is no model, or it is damaged.
        DecisionError: the policy is not one of this model.
        LaunchError: the device cannot be used, or a package is missing.
    """
    classifier = load_classifier(expand_home(os.fspath(path)), device=device, batch_size=batch_size, tta=tta)
    rules = load_policy(Path(expand_home(os.fspath(policy))), classifier.card, tta=tta) if policy is not None else None
    return Model(classifier, rules)


def _view(classifier: AnyClassifier, numbered: tuple[int, Any]) -> ImageHWC:
    number, one = numbered
    try:
        match one:
            case bytes() | bytearray() | memoryview():
                return classifier.view(bytes(one))
            case str() | os.PathLike():
                return classifier.view(read_regular(expand_home(os.fspath(one))))
            case Image.Image():
                with _LOCKS[(id(one) >> 4) % len(_LOCKS)]:  # it may be given twice, and Pillow reads it when it is used
                    pixels = rgb_of(one)
                return classifier.view_pixels(pixels)
            case np.ndarray() if one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3 and one.size:
                return classifier.view_pixels(one if min(one.strides) >= 0 else one.copy())
    except (OSError, UndecodableError) as error:
        name = f" ({os.fspath(one)})" if isinstance(one, str | os.PathLike) else ""
        reason = error.strerror if isinstance(error, OSError) else error
        raise SourceError(
            f"input {number}{name} cannot be read: {reason}",
            "it would have no answer, and the others would belong to other inputs",
            f"leave it out, or give {IN_WORDS}",
        ) from error
    what = f"array of {one.dtype} {list(one.shape)}" if isinstance(one, np.ndarray) else type(one).__name__
    raise SourceError(
        f"input {number} is not an image, but: {what}",
        "it would have no answer",
        "give a path, the bytes of an image file (of an open one: file.read()), a PIL image, or a uint8 array of RGB "
        "pixels [H, W, 3]",
    )
