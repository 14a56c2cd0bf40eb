"""Cross-validation on one shard set: `wasteddp shard --folds K` writes the splits fold-0 ... fold-K-1.

A fold is chosen by name alone: `train` is the shards of all other folds, one after another, and `val` those of the
fold. The order of the samples is a function of the numbers of samples of the shards, as for any other split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from wasteddp.data.manifest import Manifest, Split
from wasteddp.errors import SettingsError

NO_FOLD = -1
_PREFIX = "fold-"


def num_folds(manifest: Manifest) -> int:
    """Return the number of folds of a set; 0 if it has none."""
    return sum(name.startswith(_PREFIX) for name in manifest.splits)


def choose_fold(manifest: Manifest, fold: int) -> Manifest:
    """Return the manifest with the splits `train` and `val` of a fold; `NO_FOLD`: unchanged.

    Raises:
        SettingsError: the set has no such fold.
    """
    total = num_folds(manifest)
    if fold == NO_FOLD:
        return manifest
    if fold >= total:
        raise SettingsError(
            f"data.fold is {fold}, and {manifest.where} has {f'the folds 0 to {total - 1}' if total else 'no folds'}",
            "it is not known which images to train on",
            f"set data.fold to one of them, from 0 to {total - 1}"
            if total
            else "set data.fold to -1, or make a set with folds: wasteddp shard SOURCE --out FOLDER --folds 5",
        )
    folds = [manifest.splits[f"{_PREFIX}{number}"] for number in range(total)]
    splits = {
        "train": _joined("train", [split for number, split in enumerate(folds) if number != fold]),
        "val": _joined("val", [folds[fold]]),
        **{name: split for name, split in manifest.splits.items() if not name.startswith(_PREFIX)},
    }
    return replace(manifest, splits=splits)


def _joined(name: str, splits: Sequence[Split]) -> Split:
    counts = zip(*(split.samples_per_class for split in splits), strict=True)
    return Split(name, tuple(shard for split in splits for shard in split.shards), tuple(map(sum, counts)))
