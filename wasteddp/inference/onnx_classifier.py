"""Classify images with an ONNX file that `wasteddp export` wrote. Neither torch nor torchvision is imported.

Legend: B images, S side of the view, K classes, D features.

    input    images         uint8 [B, S, S, 3], RGB, as `data.decoding.centre` makes them
    outputs  probabilities  float32 [B, K], calibrated
             logits         float32 [B, K], before they are divided by the temperature
             features       float32 [B, D]
    metadata wasteddp.card  the bundle's card: classes, bins, preprocessing, temperature, hashes
             wasteddp.policy  bins and thresholds, as in policy.json; absent if the file was exported without
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.data.decoding.centre import CentreView, cut_centre, resize
from wasteddp.data.decoding.decode import ImageHWC
from wasteddp.decisions.decide import Policy
from wasteddp.errors import BundleError, LaunchError, missing_extra, print_warning
from wasteddp.files import read_regular, sha256_of
from wasteddp.inference.any_classifier import VIEWS, AnyClassifier, Outputs, read_features
from wasteddp.inference.bundle import BundleCard, parse_card
from wasteddp.parallel import num_usable_cores

BATCH_SIZE = 8  # as `inference.classifier` on a CPU
CARD_KEY, POLICY_KEY = "wasteddp.card", "wasteddp.policy"
INPUT, OUTPUTS = "images", ("probabilities", "logits", "features")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_THREADS = re.compile(r"\s*0*([1-9]\d{0,3})\s*(,|$)")  # OMP_NUM_THREADS: a number for each level; others are ignored
_NHWC = {3: 2, 2: 1}  # axes of [B, C, H, W] in [B, H, W, C]


class OnnxClassifier(AnyClassifier):
    """A model in an ONNX file, on onnxruntime.

    Args:
        path: of the file. The features of the training images, if the card names any, are looked for beside it.
        device: auto or cpu; cuda with onnxruntime-gpu.
        batch_size: images in a batch; None: 8.
        tta: a name in `VIEWS`.

    Raises:
        BundleError: the file is damaged, was not written by `wasteddp export`, or is not the one that was checked.
        LaunchError: onnxruntime is not installed, or the device cannot be used.
    """

    def __init__(
        self, path: str | Path, *, device: str = "auto", batch_size: int | None = None, tta: str = "none"
    ) -> None:
        path = Path(path)
        _refuse_unchecked(path)
        self._session = open_session(path, device)
        with _texts_of(path):
            metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        if CARD_KEY not in metadata:
            raise BundleError(
                f"{path} has no {CARD_KEY} in its metadata",
                "neither the classes nor the preprocessing would be known",
                "write it with: wasteddp export MODEL --to onnx --out FOLDER",
            )
        self.card, self.tta, self.batch_size = parse_card(metadata[CARD_KEY], path), tta, batch_size or BATCH_SIZE
        self._num_features = _refuse_other_network(self._session, self.card, path)
        self.policy = _policy(metadata, self.card, path) if tta == "none" else None
        self.training, features = None, path.parent / self.card.file_names[-1]
        if self.card.hashes.features and features.exists():
            self.training = read_features(features, self.card)
        elif self.card.hashes.features:
            print_warning(f"{features} is missing: how unlike the training images a photo is, is not known")

    @property
    def how_to_view(self) -> CentreView:
        return CentreView(self.card.preprocessing.resize_px)

    def view_pixels(self, pixels: ImageHWC) -> ImageHWC:
        size = self.card.preprocessing
        return resize(
            cut_centre(pixels, image_size_px=size.image_size_px, resize_px=size.resize_px), size.image_size_px
        )

    def outputs(self, images_BHWC: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], ...]:
        """Run one batch of any size. Return probabilities, logits and features."""
        return tuple(self._session.run(list(OUTPUTS), {INPUT: images_BHWC}))

    def _one_batch(self, views: Sequence[ImageHWC]) -> Outputs:
        images_BHWC = self._filled_up(views)
        parts, features = list[npt.NDArray[np.float32]](), []
        for axes in VIEWS[self.tta]:
            flipped = np.flip(images_BHWC, tuple(_NHWC[axis] for axis in axes)) if axes else images_BHWC
            probabilities_BK, _, features_BD = self.outputs(np.ascontiguousarray(flipped))
            parts.append(probabilities_BK)
            features.append(features_BD)
        while len(parts) > 1:  # in pairs: see VIEWS
            parts = [(one + other) * np.float32(0.5) for one, other in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0][: len(views)], features[0][: len(views)]


def open_session(path: Path, device: str = "auto") -> Any:
    """Open an ONNX file with onnxruntime, with as many threads as this process may use cores (or OMP_NUM_THREADS).

    Raises:
        BundleError: there is no such file, or it is damaged.
        LaunchError: onnxruntime is not installed, or the device cannot be used.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra("onnx", f"running {path.name}") from error
    provider = _PROVIDERS.get("cpu" if device == "auto" else device.partition(":")[0], "")
    if provider not in onnxruntime.get_available_providers():
        raise LaunchError(
            f"the device {device!r} cannot be used by this onnxruntime",
            "the model cannot run",
            "leave --device out; onnxruntime-gpu has cuda",
        )
    options = onnxruntime.SessionOptions()
    asked = _THREADS.match(os.environ.get("OMP_NUM_THREADS", ""))
    options.intra_op_num_threads = int(asked[1]) if asked else num_usable_cores()
    options.log_severity_level = 3
    if not path.is_file():
        raise BundleError(f"there is no file {path}", "there is no model to load", "check the path")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime's errors have no class of their own in common
        raise BundleError(
            f"{path} cannot be loaded: {(str(error).splitlines() or ['no reason given'])[0]}",
            "there is no model to run",
            "copy the file again, or write it again with: wasteddp export MODEL --to onnx --out FOLDER",
        ) from error


def metadata_of(card: BundleCard, policy: Policy | None) -> dict[str, str]:
    """Return the metadata of an exported file: the card and the policy whole, and their main values for other tools."""
    size = card.preprocessing
    plain = {
        "classes": list(card.classes),
        "bins": dict(card.bins),
        "temperature": card.temperature,
        "hashes": {"weights": card.hashes.weights, "manifest": card.hashes.manifest, "settings": card.hashes.settings},
        "preprocessing": {"image_size_px": size.image_size_px, "resize_px": size.resize_px, "inside": "normalisation"},
        "thresholds": _thresholds(policy),
    }
    found = {name: json.dumps(value, ensure_ascii=False) for name, value in plain.items()}
    found[CARD_KEY] = card.to_json()
    if policy:
        found[POLICY_KEY] = json.dumps(policy.to_json(), ensure_ascii=False, allow_nan=False)
    return found


def _thresholds(policy: Policy | None) -> dict[str, float]:
    if policy is None:
        return {}
    doubt = {"person_below": policy.error.threshold} if policy.error else {}
    return {**doubt, **{f"hazard {name}": one.threshold for name, one in policy.hazards.items()}}


def _refuse_unchecked(path: Path) -> None:
    """Refuse a file that is not the one in the record of its check, PATH.parity.json, if that is there.

    Raises:
        BundleError: it has other bytes, or the record cannot be read.
    """
    record = path.with_name(f"{path.name}.parity.json")
    if not (record.exists() and path.is_file()):
        return
    try:
        wanted = json.loads(read_regular(record))["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        wanted = f"nothing that can be read ({type(error).__name__})"
    if (found := sha256_of(path)) != wanted:
        raise BundleError(
            f"{path} has the sha256 {found}, and {record.name} says {wanted}",
            "it would not answer as the model that was checked",
            "copy both files again, or write them again with: wasteddp export MODEL --to onnx --out FOLDER",
        )


def _refuse_other_network(session: Any, card: BundleCard, path: Path) -> int:
    """Return the number of features, D.

    Raises:
        BundleError: inputs and outputs are not those that the card describes.
    """
    side, num_classes = card.preprocessing.image_size_px, len(card.classes)
    with _texts_of(path):
        inputs = [(one.name, one.type, list(one.shape)[1:]) for one in session.get_inputs()]
        outputs = {one.name: one.shape[-1] if one.shape else None for one in session.get_outputs()}
    widths = [outputs.get(name) for name in OUTPUTS]
    if (
        inputs != [(INPUT, "tensor(uint8)", [side, side, 3])]
        or widths[:2] != [num_classes] * 2
        or (not isinstance(widths[2], int))
    ):
        raise BundleError(
            f"the network in {path} has the inputs {inputs} and the outputs {outputs}; its card says {INPUT} of "
            f"{side}x{side} px and {num_classes} classes",
            "it has another model's card",
            "write it again with: wasteddp export MODEL --to onnx --out FOLDER",
        )
    return widths[2]


@contextmanager
def _texts_of(path: Path) -> Iterator[None]:
    """Report names and metadata of a damaged file that are not text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise BundleError(
            f"{path} has names or metadata that are not text: {error}",
            "neither the classes nor the preprocessing would be known",
            "copy the file again, or write it again with: wasteddp export MODEL --to onnx --out FOLDER",
        ) from error


def _policy(metadata: dict[str, str], card: BundleCard, path: Path) -> Policy | None:
    if POLICY_KEY not in metadata:
        return None
    try:
        policy = Policy.from_json(json.loads(metadata[POLICY_KEY]))
        policy.decide(np.full((1, len(policy.rules.classes)), 0.0))  # its thresholds are numbers, or a TypeError
        if policy.rules.classes != card.classes:
            raise ValueError("it has other classes than the model")
        return policy
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise BundleError(
            f"{path} has a policy in its metadata that cannot be read: {error}",
            "items would go into wrong bins, or nowhere",
            "write the file again with: wasteddp export MODEL --to onnx --policy FILE --out FOLDER",
        ) from error
