"""Read the CSV files that `evaluate` and `predict` write.

    source,true,predicted,p_<class>...                 of `evaluate`; a column `group` is read if it is there
    path,class,bin,probability,p_<class>...,error      of `predict`; a column `unlike` is read if it is there

Legend: N images, K classes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wasteddp.errors import RunError, joined
from wasteddp.files import read_text

_MOST_NAMED = 5
_LEAST_SUM, _LARGEST_SUM = 0.99, 1.01  # of the probabilities of an image


@dataclass(frozen=True, slots=True)
class SavedPredictions:
    paths: tuple[str, ...]  # [N], as the file has them
    probabilities_NK: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64] | None = None  # [N]; None: the images have no labels
    unlike: npt.NDArray[np.float64] | None = None  # [N]; larger: more unlike the training images
    groups: npt.NDArray[np.int32] | None = None  # [N], numbers; None: the images have no groups
    unreadable: tuple[tuple[str, str], ...] = ()  # (path, reason)


def read_predictions(path: Path, classes: Sequence[str]) -> SavedPredictions:
    """Read a file of predictions. The columns of the probabilities may be in any order.

    Raises:
        RunError: it is not such a file, or its classes are not `classes`, or a row is incomplete.
    """
    text = read_text(path, "reading the predictions")
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns, rows = list(table.fieldnames or []), list(table)
    except csv.Error as error:
        raise _refusal(f"{path} is not a CSV file: {error}") from error
    name = next((column for column in ("source", "path") if column in columns), None)
    found = [column[2:] for column in columns if column.startswith("p_")]
    if name is None or sorted(found) != sorted(classes):
        raise _refusal(
            f"{path} has the columns {', '.join(columns[:_MOST_NAMED]) or 'none'}... and probabilities of "
            f"{joined(found) or 'no class'}; the classes are {joined(classes)}"
        )
    numbers = dict(zip(classes, range(len(classes)), strict=True))
    number_of = {"'" + one: k for one, k in numbers.items()} | numbers  # see CsvWriter
    paths, probabilities, labels, unlike, unreadable = list[str](), list[list[float]](), list[int](), list[float](), []
    groups = list[int]()
    for number, row in enumerate(rows, start=2):
        if row.get("error"):
            unreadable.append((row[name], row["error"]))
            continue
        try:
            shares = [float(row[f"p_{one}"]) for one in classes]
            if not (_LEAST_SUM < sum(shares) < _LARGEST_SUM and min(shares) >= 0):
                raise ValueError("the probabilities do not add up to 1")
            if "true" in columns:
                labels.append(number_of[row["true"]])
            if row.get("unlike"):  # empty, if the model's bundle cannot measure it
                unlike.append(float(row["unlike"]))
            if "group" in columns:
                groups.append(int(np.int32(int(row["group"]))))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise _refusal(f"{path}, line {number}: {error or 'it is incomplete'}") from error
        paths.append(row[name])
        probabilities.append(shares)
    if 0 < len(unlike) < len(paths):
        raise _refusal(f"{path}: the column `unlike` is empty in {len(paths) - len(unlike)} of {len(paths)} rows")
    return SavedPredictions(
        tuple(paths),
        # The file has the shortest digits of each float32, so these are the numbers that `evaluate` decided by.
        np.array(probabilities, np.float32).astype(np.float64).reshape(-1, len(classes)),
        np.array(labels, np.int64) if "true" in columns else None,
        np.array(unlike) if unlike else None,
        np.array(groups, np.int32) if "group" in columns else None,
        tuple(unreadable),
    )


def _refusal(found: str) -> RunError:
    return RunError(
        found,
        "the probability of each class is not known",
        "give a predictions.csv of `wasteddp evaluate`, or a file of `wasteddp predict --csv`, of a model with these "
        "classes",
    )
