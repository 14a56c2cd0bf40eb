"""A trained model as it is handed on: weights and all that is needed to use them. Written whole, loaded checked.

    runs/<name>/model/model.json                        the card: classes, preprocessing, bins, hashes, origin
    runs/<name>/model/model-<sha256>.safetensors        the weights that this card names

The weights' file carries the first 12 digits of its own sha256, so new weights never overwrite old ones: replacing the
card is the one moment at which the new bundle takes effect, and a kill before or after it leaves a whole bundle.
Nothing here is ever unpickled. torch appears only where tensors do, so that a card can be read without it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wasteddp.errors import BundleError, storage
from wasteddp.files import write_atomically

if TYPE_CHECKING:
    import torch

FORMAT = "wasteddp-model"
FORMAT_VERSION = 2  # 2: of what the weights are a mean, and the teacher among the hashes
CARD_NAME = "model.json"
FOLDER_NAME = "model"  # inside a run's folder
_HEAD = "fc.weight"  # [K, features]: what torchvision's ResNets call their last layer


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes the model's input; mean and std are of RGB in 0..1."""

    image_size_px: int
    resize_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Trained:
    """Where in its run the model was taken, and the value that chose it."""

    step: int
    epoch: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class Averaged:
    """What the weights are a mean of; by default of nothing: they are as the optimizer left them."""

    ema_decay: float = 0.0  # of a moving average over the steps of the training; 0: none
    steps: tuple[int, ...] = ()  # of the checkpoints of which the weights are the mean

    def __str__(self) -> str:
        if self.steps:
            return f"mean of the checkpoints of steps {', '.join(map(str, self.steps))}"
        return f"moving average of decay {self.ema_decay:g}" if self.ema_decay else ""


@dataclass(frozen=True, slots=True)
class Hashes:
    """What the model came from. sha256 but for `code`, which is the version or commit that trained it."""

    manifest: str
    settings: str
    code: str
    weights: str = ""  # filled in by `save_bundle`
    teacher: str = ""  # weights of the model whose answers it learned too; "": none


@dataclass(frozen=True, slots=True)
class BundleCard:
    """`model.json`."""

    arch: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    trained: Trained
    hashes: Hashes
    tool: str
    bins: Mapping[str, str] = field(default_factory=dict)  # class -> bin it is thrown into; may be empty
    temperature: float = 1.0  # logits are divided by it; 1 until the model is calibrated
    thresholds: Mapping[str, float] = field(default_factory=dict)  # empty until the model is calibrated
    averaged: Averaged = Averaged()

    @property
    def weights_name(self) -> str:
        return f"model-{self.hashes.weights[:12]}.safetensors"

    def to_json(self) -> str:
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def save_bundle(folder: str | Path, card: BundleCard, state_dict: Mapping[str, torch.Tensor]) -> BundleCard:
    """Writes the bundle, replaces the one that was there, and returns the card with the weights' sha256.

    Args:
        folder: `runs/<name>/model`; made if missing. Only one process may write it.
        state_dict: keys as the bare model has them, without `module.` or `_orig_mod.`.
    """
    from safetensors.torch import save

    folder = Path(folder)
    # safetensors refuses channels_last tensors, which are not contiguous
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()})
    card = replace(card, hashes=replace(card.hashes, weights=hashlib.sha256(content).hexdigest()))
    with storage("writing the model", folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / card.weights_name, content)
    write_atomically(folder / CARD_NAME, card.to_json().encode())
    with storage("removing the model before this one", folder):
        for old in folder.glob("model-*.safetensors*"):  # and the .tmp that a kill may have left
            if old.name != card.weights_name:
                old.unlink()
    return card


def load_bundle(folder: str | Path) -> tuple[BundleCard, dict[str, torch.Tensor]]:
    """The card and the weights, on the CPU, after checking that they belong together.

    Args:
        folder: of the bundle, or of the run that has it.

    Raises:
        BundleError: nothing there, another format, or weights that are missing, damaged or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = find_bundle(folder)
    card = read_card(folder)
    try:
        content = (folder / card.weights_name).read_bytes()
    except FileNotFoundError:
        # A run that is training replaced its model between our two reads: the new card names the new weights.
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
    head = tuple(state_dict[_HEAD].shape) if _HEAD in state_dict else ()
    if head[:1] != (len(card.classes),):
        raise BundleError(
            f"{folder / CARD_NAME} names {len(card.classes)} classes, and the weights' last layer {_HEAD} is "
            f"{list(head) if head else 'missing'}",
            "answers would carry the names of other classes",
            "copy the whole model folder again, or let the run write it again (start its training again)",
        )
    return card, state_dict


def find_bundle(path: str | Path) -> Path:
    """The bundle's folder, given itself or the run's folder that holds it."""
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
            "a run writes its model after its first validation: wait for it, or start the training again to go on",
        )
    raise BundleError(
        f"{path} holds neither {CARD_NAME} nor {FOLDER_NAME}/{CARD_NAME}",
        "there is no model to load",
        f"name a run's folder or the folder that holds {CARD_NAME}",
    )


def read_card(folder: Path) -> BundleCard:
    """`model.json` of a bundle's folder, checked; the weights are not looked at."""
    path = folder / CARD_NAME
    try:
        raw = json.loads(_read(path))
        if raw["format"] != FORMAT:
            raise ValueError(f"its format is {raw['format']!r}, not {FORMAT!r}")
        if raw["format_version"] > FORMAT_VERSION:
            raise BundleError(
                f"{path} has format version {raw['format_version']}, made by {raw.get('tool', 'a newer wasteddp')}; "
                f"this wasteddp reads version {FORMAT_VERSION}",
                "what it does not know of could change the answers",
                "install that version of wasteddp or a newer one",
            )
        return _parse(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{path} is not a model's card: {type(error).__name__}: {error}",
            "neither the classes nor the preprocessing of these weights would be known",
            "copy the whole model folder again, or let the run write it again (start its training again)",
        ) from error


def _parse(raw: dict[str, Any]) -> BundleCard:
    """A card from JSON; ValueError, KeyError or TypeError say what is wrong with it."""
    rest = {key: value for key, value in raw.items() if key not in ("format", "format_version")}
    mean, std = rest["preprocessing"]["mean"], rest["preprocessing"]["std"]
    rest["preprocessing"] = Preprocessing(**{**rest["preprocessing"], "mean": tuple(mean), "std": tuple(std)})
    rest["trained"] = Trained(**rest["trained"])
    rest["hashes"] = Hashes(**rest["hashes"])
    rest["classes"] = tuple(rest["classes"])
    averaged = rest.get("averaged", {})  # format 1 has none
    rest["averaged"] = Averaged(**{**averaged, "steps": tuple(averaged.get("steps", ()))})
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
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from error


def _damaged(path: Path, what: str) -> BundleError:
    return BundleError(
        f"{path} {what}",
        "the model would not be the one that was trained",
        "copy the whole model folder again, or let the run write it again (start its training again)",
    )
