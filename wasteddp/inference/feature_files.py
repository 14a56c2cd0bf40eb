"""The summary of training images' features in a model bundle: `model/features-<sha256>.safetensors`.

The card names its sha256, so the card's own sha256 covers it. A bundle without it, as older versions of wasteddp wrote
them, is whole too: its predictions then do not have the unlikeness. New weights drop it: it belongs to the old ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

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

HOW_TO_ADD = "add them with: wasteddp features RUN"


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
