"""Accuracy by degree of unlikeness, without near-duplicates of training images, and beside the home test set.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from wasteddp.data.decoding.decode import UndecodableError, check_image
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.decisions.intervals import class_intervals, describe_groups, share_interval, wilson_interval
from wasteddp.decisions.unlikeness import UNLIKE_FROM
from wasteddp.errors import inert, storage
from wasteddp.inference.evaluation_files import Evaluation, read_record
from wasteddp.inference.metrics import percent
from wasteddp.parallel import in_order, num_usable_cores
from wasteddp.sharding import duplicates

DEGREES = (0.0, 50.0, 90.0, UNLIKE_FROM, 100.1)  # percentiles
HOME = "test"

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of some images were classified correctly."""

    num_correct: int
    num_images: int
    over_groups: tuple[float, float] | None = None  # 95 % interval over groups; None: the images have no groups

    @classmethod
    def of(cls, right_N: Flags, groups_N: npt.NDArray[np.int32] | None = None) -> Accuracy:
        """Count; with groups, the interval is over them, and NaN where they are fewer than two."""
        over_groups = None
        if groups_N is not None:
            is_enough = len(np.unique(groups_N)) > 1
            over_groups = share_interval(right_N, groups_N) if is_enough else (float("nan"), float("nan"))
        return cls(int(right_N.sum()), len(right_N), over_groups)

    @property
    def share(self) -> float:
        return self.num_correct / self.num_images if self.num_images else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval: over groups if there are groups, otherwise Wilson's; NaN if it is not known."""
        return self.over_groups or wilson_interval(self.num_correct, self.num_images)

    def to_json(self) -> dict[str, Any]:
        low, high = (None if end != end else end for end in self.interval)
        known = {"accuracy": self.share, "accuracy_low": low, "accuracy_high": high} if self.num_images else {}
        return {"num_images": self.num_images, "num_correct": self.num_correct, **known}

    def __str__(self) -> str:
        low, high = self.interval
        interval = f", 95 % interval {percent(low)} to {percent(high)}" if self.num_images else ""
        return f"{percent(self.share)} of {self.num_images} image(s){interval}"


def by_unlikeness(
    unlike_N: npt.NDArray[np.float64], right_N: Flags, groups_N: npt.NDArray[np.int32] | None = None
) -> list[tuple[float, float, Accuracy]]:
    """Return (from, below, accuracy) for the percentiles 0 to 50, to 90, to 95, and 95 to 100."""
    found = []
    for low, high in pairwise(DEGREES):
        inside = (unlike_N >= low) & (unlike_N < high)
        found.append((low, min(high, 100.0), Accuracy.of(right_N[inside], _of(groups_N, inside))))
    return found


def _of(groups_N: npt.NDArray[np.int32] | None, rows: Flags) -> npt.NDArray[np.int32] | None:
    return None if groups_N is None else groups_N[rows]


def difference(home: Accuracy, here: Accuracy) -> tuple[float, float, float]:
    """Return home's accuracy less the one here, and its 95 % interval. Both have images.

    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10.
    """
    (low_1, high_1), (low_2, high_2) = home.interval, here.interval
    gap = home.share - here.share
    return (
        gap,
        gap - sqrt((home.share - low_1) ** 2 + (high_2 - here.share) ** 2),
        gap + sqrt((high_1 - home.share) ** 2 + (here.share - low_2) ** 2),
    )


def read_home(run: Path, weights: str) -> tuple[Accuracy | None, str]:
    """Return the accuracy in RUN/evaluations/test, or None and the reason why it is not used.

    Args:
        weights: sha256 of the weights that must have been evaluated.
    """
    path = run / "evaluations" / HOME / "metrics.json"
    if not path.is_file():
        return None, f"there is no {path}; measure it with: wasteddp evaluate {run}"
    try:
        with storage("reading the home evaluation", path):
            record = read_record(path)
    except ValueError as error:
        return None, f"{path} is damaged ({error}); measure it again with: wasteddp evaluate {run}"
    if record["hashes"]["weights"] != weights:
        return None, f"{path} is of other weights; measure it again with: wasteddp evaluate {run}"
    over_groups = (record["accuracy_low"], record["accuracy_high"]) if record.get("groups") else None
    return Accuracy(record["num_correct"], record["num_samples"], over_groups), ""


def near_by_manifest(manifest: Manifest, split: str, train: str, sources: Sequence[str]) -> Flags | None:
    """Return which images of a split have a near-duplicate in train, as sharding found; None if it is not known."""
    across = manifest.near_duplicates.get("across_splits", {})
    counts = across.get(f"{train}-{split}") or across.get(f"{split}-{train}")
    if counts is None:
        return None
    near = set[str]()
    for one, split_of_one, other, split_of_other, _ in manifest.near_duplicates.get("pairs", ()):
        if (split_of_one, split_of_other) == (train, split):
            near.add(other)
        elif (split_of_one, split_of_other) == (split, train):
            near.add(one)
    flags_N = np.array([source in near for source in sources], bool)
    return flags_N if flags_N.sum() == counts.get(f"{split}_images", len(near)) else None  # a list that was cut


def near_by_hashes(train: SplitReader, images: Iterable[bytes]) -> Flags:
    """Return which images have a near-duplicate among the training images. Images without pixels have none.

    At most `duplicates.MOST_LISTED` pairs are found.
    """
    numbers = range(train.num_samples)
    workers = num_usable_cores()
    hashes = list(in_order(lambda number: _hash(train.read(number)), numbers, workers=workers))
    hashes += list(in_order(_hash, images, workers=workers))
    there = np.array([one is not None for one in hashes], bool)
    found = [one for one in hashes if one is not None]
    kinds = (np.flatnonzero(there) >= train.num_samples).astype(np.int64)
    near = duplicates.find_near(
        np.array([one.bits64 for one in found], np.uint64),
        np.frombuffer(b"".join(one.bits256 for one in found), np.uint8).reshape(-1, 32),
        kinds,
        np.array([[False, True], [True, False]]),
    )
    flags = np.zeros(len(hashes), bool)
    flags[np.flatnonzero(there)[near.pairs[:, 1]]] = True  # the second is of the higher kind
    return flags[train.num_samples :]


def _hash(data: bytes) -> duplicates.PerceptualHash | None:
    try:
        return duplicates.perceptual_hash(check_image(data).grey)
    except UndecodableError:
        return None


def compare(evaluation: Evaluation, near_N: Flags | None) -> dict[str, Any]:
    """Return what metrics.json records of an evaluation besides its metrics."""
    predicted_N = evaluation.probabilities_NK.argmax(axis=1)
    right_N = predicted_N == evaluation.labels
    groups_N = evaluation.groups.to_resample if evaluation.groups else None
    record: dict[str, Any] = {}
    if evaluation.groups:
        record["groups"] = evaluation.groups.to_json()
    if groups_N is not None:
        intervals = class_intervals(evaluation.labels, predicted_N, groups_N, num_classes=len(evaluation.seen.classes))
        record["groups"] |= {"recall": intervals.to_json()["recall"], "precision": intervals.to_json()["precision"]}
    if evaluation.unlike_N is not None:
        record["by_unlikeness"] = [
            {"from": low, "to": high, **part.to_json()}
            for low, high, part in by_unlikeness(evaluation.unlike_N, right_N, groups_N)
        ]
    if near_N is not None:
        record["near_duplicates_in_train"] = {
            "with": Accuracy.of(right_N, groups_N).to_json(),
            "without": Accuracy.of(right_N[~near_N], _of(groups_N, ~near_N)).to_json(),
            "num_near": int(near_N.sum()),
        }
    return record


def print_comparison(console: Console, record: dict[str, Any]) -> None:
    """Print what `compare` returned."""
    if rows := record.get("by_unlikeness"):
        table = Table("percentile of val", title="by unlikeness to the training images", title_justify="left")
        for column in ("images", "accuracy", "95 % interval"):
            table.add_column(column, justify="right")
        for row in rows:
            accuracy = _read(row)
            low, high = accuracy.interval
            interval = f"{percent(low)} to {percent(high)}" if low == low else "-"
            mark = " (unlike)" if row["from"] == UNLIKE_FROM else ""
            table.add_row(
                f"{row['from']:g} to {row['to']:g}{mark}",
                str(accuracy.num_images),
                percent(accuracy.share),
                interval,
            )
        console.print(table)
    if near := record.get("near_duplicates_in_train"):
        without = _read(near["without"])
        console.print(
            f"near-duplicates: {near['num_near']} of {near['with']['num_images']} images have one in train; "
            f"accuracy without them: {without}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if line := describe_groups(record.get("groups")):
        console.print(inert(line), markup=False, highlight=False, soft_wrap=True)


def _read(row: Mapping[str, Any]) -> Accuracy:
    """Return the accuracy of `Accuracy.to_json`."""
    ends = [row.get(name) for name in ("accuracy_low", "accuracy_high")]
    low, high = (float("nan") if end is None else end for end in ends)
    return Accuracy(row["num_correct"], row["num_images"], (low, high))
