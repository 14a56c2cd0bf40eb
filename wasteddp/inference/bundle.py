"""Model bundles: the weights of a trained model and everything that is needed to use them.

    runs/<name>/model/model.json                        the card: classes, preprocessing, bins, hashes, origin
    runs/<name>/model/model-<sha256>.safetensors        the weights that this card names
    runs/<name>/model/features-<sha256>.safetensors     a summary of training images' features, if the card names one
    runs/<name>/model/README.md                         a text for people, see `model_card`; without a hash, never read

The name of the weights' file has the first 12 digits of its sha256, so new weights never overwrite old ones. A new
bundle takes effect when its card replaces the old one; a kill before or after that leaves a complete bundle. Loading
checks the hashes and unpickles nothing. torch is imported only for tensors, so that a card can be read without it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wasteddp.decisions.calibration import Calibration
from wasteddp.errors import BundleError, storage
from wasteddp.files import make_folder, read_regular, write_atomically

if TYPE_CHECKING:
    import torch

FORMAT = "wasteddp-model"
# 2: adds `averaged`, and the teacher to the hashes; 3: the sha256 of the card itself; 4: the hash of the features;
# 5: the number of groups that the intervals of the calibration are over
FORMAT_VERSION = 5
CARD_NAME = "model.json"
FOLDER_NAME = "model"  # inside a run's folder
_OWN = re.compile(r"(model|features)-[0-9a-f]{12}\.safetensors(\..*)?")  # not what a user has put there


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes the model's input. Mean and std are those of RGB in 0..1."""

    image_size_px: int
    resize_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Trained:
    """The position in the run at which the model was saved, and the metric's value that selected it."""

    step: int
    epoch: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class Averaged:
    """What the weights are a mean of. By default they are not averaged."""

    ema_decay: float = 0.0  # of a moving average over the training steps; 0: none
    steps: tuple[int, ...] = ()  # of the checkpoints that were averaged

    def __str__(self) -> str:
        if self.steps:
            return f"mean of the checkpoints of steps {', '.join(map(str, self.steps))}"
        return f"moving average of decay {self.ema_decay:g}" if self.ema_decay else ""


@dataclass(frozen=True, slots=True)
class Hashes:
    """What the model was made from. All are sha256 except `code`, the version or commit that trained it."""

    manifest: str
    settings: str
    code: str
    weights: str = ""  # filled in by `save_bundle`
    teacher: str = ""  # weights of the model that it was distilled from; "": none
    features: str = ""  # summary of training images' features, see `any_classifier`; "": none


@dataclass(frozen=True, slots=True)
class BundleCard:
    """`model.json`."""

    arch: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    trained: Trained
    hashes: Hashes
    tool: str
    bins: Mapping[str, str] = field(default_factory=dict)  # class -> bin that it belongs in; may be empty
    temperature: float = 1.0  # logits are divided by it; 1 if the model is not calibrated
    thresholds: Mapping[str, float] = field(default_factory=dict)  # empty if the model is not calibrated
    averaged: Averaged = Averaged()
    calibration: Mapping[str, Any] = field(default_factory=dict)  # see decisions.calibration; empty if not calibrated

    @property
    def weights_name(self) -> str:
        return f"model-{self.hashes.weights[:12]}.safetensors"

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names of the bundle's files."""
        features = f"features-{self.hashes.features[:12]}.safetensors"
        return CARD_NAME, self.weights_name, *([features] if self.hashes.features else [])

    def to_json(self) -> str:
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        content["sha256"] = _hash_of_card(content)
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def save_bundle(folder: str | Path, card: BundleCard, state_dict: Mapping[str, torch.Tensor]) -> BundleCard:
    """Write the bundle in place of the existing one. Return the card with the weights' sha256.

    Args:
        folder: `runs/<name>/model`; created if missing. Only one process may write it.
        state_dict: keys of the bare model, without `module.` or `_orig_mod.`.
    """
    from safetensors.torch import save

    folder = Path(folder)
    # safetensors refuses channels_last tensors, which are not contiguous
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()})
    card = replace(card, hashes=replace(card.hashes, weights=hashlib.sha256(content).hexdigest()))
    with storage("writing the model", folder):
        make_folder(folder)
    write_atomically(folder / card.weights_name, content)
    write_atomically(folder / CARD_NAME, card.to_json().encode())
    remove_old(folder, card)
    return card


def remove_old(folder: Path, card: BundleCard) -> None:
    """Remove the files that the card does not name, and the .tmp that a kill may have left."""
    with storage("removing the previous model", folder):
        for old in folder.iterdir():
            if _OWN.fullmatch(old.name) and old.name not in card.file_names:
                old.unlink()


def replace_card(folder: Path, card: BundleCard) -> None:
    """Write another card for the weights that are in the folder."""
    write_atomically(folder / CARD_NAME, card.to_json().encode())


def refuse_other_weights(folder: Path, card: BundleCard, weights: str, what: str) -> None:
    """Refuse to add to a bundle what was computed with other weights than those that it has now.

    Args:
        card: that the folder has now.
        weights: sha256 of the weights that were used.
        what: subject and verb of the sentence "... those of WEIGHTS".

    Raises:
        BundleError: the weights are others.
    """
    if card.hashes.weights != weights:
        raise BundleError(
            f"{folder} has new weights, {card.hashes.weights[:12]}; {what} those of {weights[:12]}",
            "the model would answer with figures of another network",
            "wait for the training to end, and run the same command again",
        )


def load_bundle(folder: str | Path) -> tuple[BundleCard, dict[str, torch.Tensor]]:
    """Return the card and the weights, on the CPU, after checking that they belong together.

    Args:
        folder: the bundle's folder, or the run's folder that holds it.

    Raises:
        BundleError: there is no bundle, it has another format, or its weights are missing, damaged or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from wasteddp.model.networks import head_of

    folder = find_bundle(folder)
    card = read_card(folder)
    try:
        content = read_regular(folder / card.weights_name)
    except OSError:
        # A running training replaced its model between the two reads. The new card names the new weights.
        card = read_card(folder)
        content = _read(folder / card.weights_name)
    found = hashlib.sha256(content).hexdigest()
    if found != card.hashes.weights:
        raise _damaged(
            folder / card.weights_name,
            f"has {len(content)} bytes with sha256 {found[:12]}, and {CARD_NAME} says {card.hashes.weights[:12]}",
        )
    try:
        state_dict: dict[str, torch.Tensor] = load(content)
    except SafetensorError as error:
        raise _damaged(folder / card.weights_name, f"is not a safetensors file: {error}") from error
    name = f"{head_of(card.arch)}.weight"  # [K, features]
    head = tuple(state_dict[name].shape) if name in state_dict else ()
    if head[:1] != (len(card.classes),):
        raise BundleError(
            f"{folder / CARD_NAME} names {len(card.classes)} classes, and the weights' last layer {name} is "
            f"{list(head) if head else 'missing'}",
            "predictions would have the names of other classes",
            "copy the whole model folder again, or let the run write it again (start its training again)",
        )
    return card, state_dict


def find_bundle(path: str | Path) -> Path:
    """Return the bundle's folder, given that folder or the run's folder that holds it.

    Raises:
        BundleError: there is no bundle.
    """
    path = Path(path)
    for folder in (path, path / FOLDER_NAME):
        if (folder / CARD_NAME).is_file():
            return folder
    if not path.is_dir():
        raise BundleError(
            f"{path} is a file" if path.exists() else f"there is no folder {path}",
            "there is no model to load",
            f"name a run's folder or the folder that holds {CARD_NAME}",
        )
    if (path / "settings.yaml").exists() or (path / "checkpoints").exists():
        raise BundleError(
            f"the run {path} has no {FOLDER_NAME}/{CARD_NAME} yet",
            "there is no model to load",
            "a run writes its model after its first validation: wait for it, or start the training again to continue",
        )
    raise BundleError(
        f"{path} holds neither {CARD_NAME} nor {FOLDER_NAME}/{CARD_NAME}",
        "there is no model to load",
        f"name a run's folder or the folder that holds {CARD_NAME}",
    )


def read_card(folder: Path) -> BundleCard:
    """Read and check `model.json` in a bundle's folder, without the weights.

    Raises:
        BundleError: the card cannot be read, or has another or a newer format.
    """
    path = folder / CARD_NAME
    return parse_card(_read(path), path)


def parse_card(content: str | bytes, path: Path) -> BundleCard:
    """Read and check the text of a card; `path` is where it was found.

    Raises:
        BundleError: see `read_card`.
    """
    try:
        raw = json.loads(content)
        if raw["format"] != FORMAT:
            raise ValueError(f"its format is {raw['format']!r}, not {FORMAT!r}")
        if raw["format_version"] > FORMAT_VERSION:
            raise BundleError(
                f"{path} has format version {raw['format_version']}, made by {raw.get('tool', 'a newer wasteddp')}; "
                f"this wasteddp reads version {FORMAT_VERSION}",
                "unknown settings could change the predictions",
                "install that version of wasteddp or a newer one",
            )
        if raw.pop("sha256", None) != _hash_of_card(raw) and raw["format_version"] > 2:
            raise ValueError("its content is not the one that was written: its sha256 differs")
        return _parse(raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{path} is not a model's card: {type(error).__name__}: {error}",
            "neither the classes nor the preprocessing of these weights would be known",
            "copy the whole model folder again, or let the run write it again (start its training again)",
        ) from error


def _hash_of_card(content: Mapping[str, Any]) -> str:
    """Return the sha256 of a card's content, whatever the order and the layout of its JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _parse(raw: dict[str, Any]) -> BundleCard:
    """Return the card in parsed JSON.

    Raises:
        ValueError, KeyError, TypeError: the card is not valid.
    """
    rest = {key: value for key, value in raw.items() if key not in ("format", "format_version")}
    mean, std = rest["preprocessing"]["mean"], rest["preprocessing"]["std"]
    rest["preprocessing"] = Preprocessing(**{**rest["preprocessing"], "mean": tuple(mean), "std": tuple(std)})
    rest["trained"] = Trained(**rest["trained"])
    rest["hashes"] = Hashes(**rest["hashes"])
    rest["classes"] = tuple(rest["classes"])
    averaged = rest.get("averaged", {})  # format 1 does not have it
    rest["averaged"] = Averaged(**{**averaged, "steps": tuple(averaged.get("steps", ()))})
    if rest.get("calibration"):
        Calibration.from_json(rest["calibration"])
    card = BundleCard(**rest)
    if len(set(card.classes)) != len(card.classes) or not all(isinstance(name, str) for name in card.classes):
        raise ValueError("the classes are not different names")
    if not (card.temperature > 0 and math.isfinite(card.temperature)):
        raise ValueError(f"the temperature is {card.temperature}")
    if not 0 < card.preprocessing.image_size_px <= card.preprocessing.resize_px:
        raise ValueError(f"the image size is {card.preprocessing.image_size_px} of {card.preprocessing.resize_px} px")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean {mean} and std {std} are not three numbers each, std above 0")
    return card


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from error


def _damaged(path: Path, what: str) -> BundleError:
    return BundleError(
        f"{path} {what}",
        "the model would not be the one that was trained",
        "copy the whole model folder again, or let the run write it again (start its training again)",
    )
