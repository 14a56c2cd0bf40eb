"""Weights for other programs: `--to pytorch` and `--to hub`.

    DIR/<arch>.pth            `torchvision.models.<arch>(num_classes=K).load_state_dict(torch.load(PATH))` takes it
    DIR/preprocessing.py      from an image file to the network's input, with torchvision alone
    DIR/parity.json           the check

The folder for the Hugging Face Hub is the model's bundle, which `wasteddp.load` takes after a download, with a config,
the preprocessing and a card.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image

from wasteddp.errors import BundleError, LaunchError, missing_extra
from wasteddp.export import preprocessing
from wasteddp.export.parity import Reference, compare_answers, compare_pixels
from wasteddp.files import read_regular, write_atomically
from wasteddp.inference.any_classifier import read_features
from wasteddp.inference.bundle import BundleCard, save_bundle
from wasteddp.model.networks import TIMM

PREPROCESSING = "preprocessing.py"
PIXEL_TOLERANCE = 1  # of 255: torchvision resizes uint8 in other steps on a processor without AVX2
_UPLOADED = ("config.json", "README.md", PREPROCESSING, "parity.json")  # and the files of the bundle
_CONSTANT = re.compile(r"^(CLASSES|TEMPERATURE|IMAGE_SIZE|MEAN)\b[^=]*= [^#\n]*", re.MULTILINE)


def write_pytorch(card: BundleCard, weights: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """Write the weights with torchvision's names, and the preprocessing. Return the path of the weights."""
    path = folder / f"{card.arch.removeprefix(TIMM)}.pth"
    buffer = io.BytesIO()
    torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, buffer)
    write_atomically(path, buffer.getvalue())
    write_preprocessing(card, folder)
    return path


def write_preprocessing(card: BundleCard, folder: Path) -> None:
    """Write the module `export.preprocessing` with the model's values."""
    write_atomically(folder / PREPROCESSING, _preprocessing_of(card))


def _preprocessing_of(card: BundleCard) -> bytes:
    """Return the source of that module. The values are plain literals, whatever the card holds."""
    size = card.preprocessing
    values = {
        "CLASSES": f"CLASSES: list[str] = {list(map(str, card.classes))!r}",
        "TEMPERATURE": f"TEMPERATURE = {float(card.temperature)!r}",
        "IMAGE_SIZE": f"IMAGE_SIZE, RESIZE = {int(size.image_size_px)}, {int(size.resize_px)}  ",
        "MEAN": f"MEAN, STD = {tuple(map(float, size.mean))!r}, {tuple(map(float, size.std))!r}",
    }
    source = inspect.getsource(preprocessing)
    return _CONSTANT.sub(lambda found: values[found[1]], source).encode("utf-8", "backslashreplace")


def check_pytorch(card: BundleCard, path: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    """Load the exported files as another program would, and compare pixels and answers."""
    network = _network(card.arch, len(card.classes))
    network.load_state_dict(torch.load(path, weights_only=True))
    return _check(card, network.eval(), path.parent, reference)


def write_hub(bundle: Path, card: BundleCard, weights: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """Write the folder that huggingface_hub uploads. Return the path of the weights."""
    save_bundle(folder, card, weights)
    copy_features(bundle, card, folder)
    write_preprocessing(card, folder)
    numbers = {name: number for number, name in enumerate(card.classes)}
    config = {
        "library_name": "wasteddp",
        "architecture": card.arch,
        "num_classes": len(card.classes),
        "id2label": {str(number): name for name, number in numbers.items()},
        "label2id": numbers,
        "bins": dict(card.bins),
        "temperature": card.temperature,
        "image_size": card.preprocessing.image_size_px,
        "resize": card.preprocessing.resize_px,
        "mean": list(card.preprocessing.mean),
        "std": list(card.preprocessing.std),
        "weights": card.weights_name,
        "weights_sha256": card.hashes.weights,
    }
    text = json.dumps(config, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / "config.json", text.encode())
    own = bundle / "README.md"
    write_atomically(folder / "README.md", read_regular(own) if own.is_file() else _plain_card(card).encode())
    return folder / card.weights_name


def copy_features(bundle: Path, card: BundleCard, folder: Path) -> None:
    """Copy the features that the card names, if it names any.

    Raises:
        BundleError: the file is missing or damaged, or a training has replaced it.
    """
    if card.hashes.features:
        path = bundle / card.file_names[-1]
        read_features(path, card)
        write_atomically(folder / path.name, read_regular(path))


def check_hub(card: BundleCard, path: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    """Build the network from config.json and the weights, and compare pixels and answers."""
    from safetensors.torch import load_file

    config = json.loads(read_regular(path.parent / "config.json"))
    network = _network(config["architecture"], config["num_classes"])
    network.load_state_dict(load_file(path.parent / config["weights"]))
    return _check(card, network.eval(), path.parent, reference)


def token() -> str:
    """Return the token of the Hugging Face Hub in the environment.

    Raises:
        LaunchError: there is none.
    """
    found = os.environ.get("HF_TOKEN", "")
    if not found:
        raise LaunchError(
            "the variable HF_TOKEN is not set",
            "the Hub would refuse the upload",
            "create a token with write access on huggingface.co, and set HF_TOKEN to it; or leave --repo out",
        )
    return found


def upload(folder: Path, repo: str, card: BundleCard) -> str:
    """Upload the model in the folder to a repository, a private one if it is new. Return its URL.

    Raises:
        LaunchError: there is no token, huggingface_hub is not installed, or the Hub refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise missing_extra("remote", "uploading to the Hugging Face Hub") from error
    key = token()
    api = HfApi(token=key)
    try:
        url = str(api.create_repo(repo, private=True, exist_ok=True))
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=[*card.file_names, *_UPLOADED],
            commit_message="Upload a model",
        )
    except Exception as error:  # huggingface_hub's, and those of its HTTP client
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(key, "***")
        raise LaunchError(
            f"the Hub refused the upload to {repo}: {reason}",
            f"the repository may be incomplete; {folder} is complete",
            "check the name (USER/NAME) and the token's rights, and run the same command again",
        ) from error
    return url


def _network(arch: str, num_classes: int) -> torch.nn.Module:
    """Return the network as another program builds it, without wasteddp."""
    if arch.startswith(TIMM):
        import timm

        model: torch.nn.Module = timm.create_model(arch.removeprefix(TIMM), num_classes=num_classes)
        return model
    how = {}
    if arch.startswith("vit_"):  # some are published for larger images than their default
        how["image_size"] = torchvision.models.get_model_weights(arch).DEFAULT.meta["min_size"][0]
    plain: torch.nn.Module = torchvision.models.get_model(arch, num_classes=num_classes, **how)
    return plain


def _check(
    card: BundleCard, network: torch.nn.Module, folder: Path, reference: Reference
) -> tuple[dict[str, Any], list[str]]:
    module: dict[str, Any] = {}
    source = _preprocessing_of(card)  # run from here: a file could be another one by now
    if read_regular(folder / PREPROCESSING) != source:
        raise BundleError(
            f"{folder / PREPROCESSING} changed while it was checked",
            "what was checked would not be what is there",
            "write to a folder that no other program changes",
        )
    exec(compile(source, PREPROCESSING, "exec"), module)
    if tuple(module["CLASSES"]) != card.classes:
        raise BundleError(
            f"{folder / PREPROCESSING} has the classes {module['CLASSES']}",
            "the model has others, or their names are not UTF-8",
            "shard the images again with other names of classes",
        )
    images = [module["CentreSquare"]()(Image.open(io.BytesIO(data))) for data in reference.data]
    record, wrong = compare_pixels(
        reference, [image.permute(1, 2, 0).numpy() for image in images], tolerance=PIXEL_TOLERANCE
    )
    inputs = torch.stack([module["preprocess"](Image.open(io.BytesIO(data))) for data in reference.data])
    numbers = np.arange(len(inputs))

    def run(numbers: Any) -> tuple[Any, Any]:
        with torch.inference_mode():
            logits_BK = network(inputs[numbers])
        return (logits_BK / module["TEMPERATURE"]).softmax(1).numpy(), logits_BK.numpy()

    answers, further = compare_answers(reference, run, numbers)
    return {"pixels": record, "answers": answers}, [*wrong, *further]


def _plain_card(card: BundleCard) -> str:
    """Return a card with what is known of a bundle that has none."""
    return f"""---
library_name: wasteddp
pipeline_tag: image-classification
tags:
- image-classification
- waste
---

# {card.arch} for {len(card.classes)} classes of waste

Trained with {card.tool}. `config.json` lists the classes.

    import wasteddp
    from huggingface_hub import snapshot_download
    model = wasteddp.load(snapshot_download("THIS REPOSITORY"))
    answers = model.predict(["photo.jpg"])

Without wasteddp, `preprocessing.py` makes the input from an image file, and `config.json` names the network of
torchvision and the file of its weights.
"""
