"""`wasteddp verify RUN`: read everything that a run has written, and name all damage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wasteddp import settings
from wasteddp.errors import CheckpointError, WastedError
from wasteddp.files import read_regular
from wasteddp.inference.any_classifier import load_features
from wasteddp.inference.bundle import CARD_NAME, FOLDER_NAME, load_bundle
from wasteddp.training.checkpoint import reader
from wasteddp.training.tracking.tracker import METRICS_FILE


@dataclass(frozen=True, slots=True)
class Verified:
    """What was read, and what is damaged: a line for each."""

    checked: tuple[str, ...]
    damaged: tuple[str, ...]


def is_run(folder: Path) -> bool:
    """Whether a folder was written by a training, or is a model."""
    return any((folder / name).exists() for name in (reader.FOLDER, reader.SETTINGS, CARD_NAME, FOLDER_NAME))


def verify_run(folder: Path) -> Verified:
    """Read the checkpoints, the models, the settings, the metrics and the evaluations of a run."""
    checked, damaged = list[str](), list[str]()
    for name, check in _checks(folder):
        problem = _problem(check)
        (damaged if problem else checked).append(f"{name}: {problem}" if problem else name)
    return Verified(tuple(checked), tuple(damaged))


def require_intact(folder: Path, verified: Verified) -> None:
    """Raise a CheckpointError that names all damage."""
    if verified.damaged:
        raise CheckpointError(
            f"{len(verified.damaged)} of {len(verified.damaged) + len(verified.checked)} parts of {folder} are "
            "damaged:\n  " + "\n  ".join(verified.damaged),
            "what is damaged cannot be used or trusted",
            "restore these parts from a backup; a training that is started again skips a damaged checkpoint",
        )


def _checks(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each part of a run, with the function that reads it."""
    for path in reader.listed(folder / reader.FOLDER):
        yield f"{reader.FOLDER}/{path.name}", partial(reader.read, path)
    for place in (folder, folder / FOLDER_NAME, folder / "average", folder / "average" / FOLDER_NAME):
        if (place / CARD_NAME).exists():
            yield str(place.relative_to(folder) / CARD_NAME), partial(_load_model, place)
    if (folder / reader.SETTINGS).exists():
        yield reader.SETTINGS, partial(settings.load, folder / reader.SETTINGS)
    if (folder / METRICS_FILE).exists():
        yield METRICS_FILE, partial(_read_rows, folder / METRICS_FILE)
    for path in sorted(folder.glob("evaluations/*/metrics.json")):
        yield str(path.relative_to(folder)), partial(_read_json, path)


def _load_model(folder: Path) -> None:
    card, _ = load_bundle(folder)
    load_features(folder, card)


def _problem(check: Callable[[], object]) -> str:
    """Return what is wrong, in words; nothing if the part is intact."""
    try:
        check()
    except WastedError as error:
        return error.found
    except (OSError, ValueError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _read_json(path: Path) -> object:
    return json.loads(read_regular(path))


def _read_rows(path: Path) -> None:
    for number, line in enumerate(read_regular(path).splitlines(), start=1):
        try:
            json.loads(line)["step"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"line {number} is not a row of metrics") from error
