"""Write `README.md` next to a model: Hugging Face's model card, with the figures that the program measured.

Nothing reads a figure from it, and `wasteddp verify` does not check it: `model.json` and the files that it names have
hashes. It is written again after each evaluation and calibration, unless a person has edited it. The lines `license:`,
`license_name:` and `license_link:` in its head belong to the user and are kept.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import yaml

from wasteddp.data.dataset import NO_FOLD, choose_fold
from wasteddp.data.manifest import Manifest
from wasteddp.data.remote.folder import is_url
from wasteddp.errors import WastedError, storage
from wasteddp.files import read_regular, write_atomically
from wasteddp.inference.bundle import BundleCard, find_bundle, read_card
from wasteddp.inference.evaluation_files import read_record
from wasteddp.inference.model_card.content import Measured, describe_model
from wasteddp.inference.sorting import read_decisions

README_NAME = "README.md"
_LICENSE = re.compile(r"^license(?:_name|_link)?:[^\r\n]*\n", re.MULTILINE)
_SEAL = re.compile(r"<!-- wasteddp: sha256 of this file without its license: ([0-9a-f]{64}) -->\n$")
_HEAD = re.compile(r"\A---\n.*?^---\n", re.MULTILINE | re.DOTALL)


def write_model_card(home: Path, *, manifest: Manifest | None = None) -> str:
    """Write the card of a run's model, or of a model's folder. Return a line on what was done.

    Args:
        home: folder of a run, or of a model, that may have `evaluations`.
        manifest: of the set that is open; used if the model was trained on it.

    Raises:
        BundleError: there is no model. StorageError: the file cannot be written.
    """
    folder = find_bundle(home)
    card = read_card(folder)
    path = folder / README_NAME
    with storage("reading the model's card", path):
        old = read_regular(path).decode("utf-8", "replace") if path.exists() else ""
    if old and not is_as_written(old):
        return f"{path} was edited, so it is not written again: remove it, and evaluate, to have a new one"
    known = manifest if manifest and manifest.sha256 == card.hashes.manifest else _manifest_of(home, card)
    text = describe_model(home.resolve().name, card, known, _measured(home, card))
    write_atomically(path, _sealed(text, _licenses(old)).encode())
    return f"model card: {path}"


def is_as_written(text: str) -> bool:
    """Whether a card is as the program wrote it, apart from its license."""
    found = _SEAL.search(text)
    return found is not None and found[1] == _hash(text[: found.start()])


def _sealed(text: str, licenses: str) -> str:
    """Return the text with the user's license in its head and its hash at its end."""
    seal = f"<!-- wasteddp: sha256 of this file without its license: {_hash(text)} -->\n"
    return text.replace("---\n", f"---\n{licenses}", 1) + seal


def _hash(text: str) -> str:
    head = _HEAD.match(text)
    end = head.end() if head else 0
    return hashlib.sha256((_LICENSE.sub("", text[:end]) + text[end:]).encode()).hexdigest()


def _licenses(old: str) -> str:
    head = _HEAD.match(old)
    return "".join(_LICENSE.findall(head[0])) if head else ""


def _measured(home: Path, card: BundleCard) -> Measured:
    """Return the evaluations and decisions of these weights; others are counted."""
    evaluations, decisions, num_other = [], {}, 0
    for path in sorted((home / "evaluations").glob("*/metrics.json")):
        try:
            record = read_record(path)
        except (OSError, ValueError):
            num_other += 1
            continue
        if record["hashes"]["weights"] != card.hashes.weights:
            num_other += 1
            continue
        evaluations.append(record)
        try:
            found = read_decisions(path.parent / "decisions.json")
        except (OSError, ValueError):
            continue
        if (found["model"]["weights"], found["model"]["temperature"]) == (card.hashes.weights, card.temperature):
            decisions[record["options"]["split"]] = found
    first = {"test": 0, "val": 1}
    evaluations.sort(key=lambda record: (first.get(record["options"]["split"], 2), record["options"]["split"]))
    return Measured(tuple(evaluations), decisions, num_other)


def _manifest_of(home: Path, card: BundleCard) -> Manifest | None:
    """Return the manifest of the set in the run's settings, if it is in a folder and the model was trained on it."""
    try:
        data = yaml.safe_load(read_regular(home / "settings.yaml"))["data"]
        if is_url(str(data["shards"])):
            return None
        found = choose_fold(Manifest.load(str(data["shards"])), data.get("fold", NO_FOLD))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError, WastedError):
        return None
    return found if found.sha256 == card.hashes.manifest else None
