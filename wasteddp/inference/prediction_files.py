"""Outputs for predictions, the terminal, a CSV file and a JSON file, and the CSV files read again.

Files are written under a temporary name and renamed at the end, so that a kill never leaves an incomplete file. Memory
does not grow with the number of predictions. The columns that are read again:

    source,true,predicted,p_<class>...                 of `evaluate`; a column `group` is read if it is there
    path,class,bin,probability,p_<class>...,error      of `predict`; a column `unlike` is read if it is there

Legend: N images, K classes.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from wasteddp.decisions.decide import PERSON, REASONS, Policy
from wasteddp.decisions.unlikeness import UNLIKE_FROM, TrainingFeatures
from wasteddp.errors import RunError, SourceError, inert, joined, storage
from wasteddp.files import CsvWriter, read_text, written_whole
from wasteddp.inference.any_classifier import HOW_TO_ADD_FEATURES
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.metrics import as_float, percent

_FAILURES_LISTED = 20
_DECIDED = ("decision", "bin_probability", "why")
_MOST_NAMED = 5
_LEAST_SUM, _LARGEST_SUM = 0.99, 1.01  # of the probabilities of an image


@dataclass(frozen=True, slots=True)
class Decision:
    """The bin or the person that a policy chooses for one image."""

    bin: str
    probability: float  # of the best bin without a person and without hazards
    why: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's prediction for one file."""

    path: str
    probabilities: npt.NDArray[np.float32]  # [K]
    unlike: float | None = None  # percentile, 0 to 100, see `decisions.unlikeness`; None: not known
    decision: Decision | None = None  # of the policy; None: there is no policy


@dataclass(frozen=True, slots=True)
class Failure:
    """A file that could not be read, and why."""

    path: str
    reason: str


Prediction = Answer | Failure


def decisions_of(policy: Policy, probabilities_BK: npt.NDArray[np.float32]) -> list[Decision]:
    """Return the policy's decision for each image."""
    found = policy.decide(probabilities_BK)
    names = (*policy.rules.bins, PERSON)
    return [
        Decision(names[number], float(confidence), REASONS[reason])
        for number, confidence, reason in zip(found.assigned, found.confidence, found.reasons, strict=True)
    ]


def refuse_one_file(csv: Path | None, json: Path | None) -> None:
    """Refuse the same file for both outputs.

    Raises:
        SourceError: they are the same.
    """
    if csv is not None and json is not None and csv.resolve() == json.resolve():
        raise SourceError(
            f"--csv and --json both name {csv}", "one would overwrite the other", "give each a file of its own"
        )


class Record(Protocol):
    def add(self, prediction: Prediction) -> None: ...


class Terminal:
    """Prints a line for each image immediately, and lists the files that could not be read at the end.

    The file's name is the last column, because its width is not known before the last image.
    """

    def __init__(
        self, card: BundleCard, *, top: int, training: TrainingFeatures | None = None, policy: Policy | None = None
    ) -> None:
        self._card, self._top, self._training, self._policy = card, min(top, len(card.classes)), training, policy
        self._decided = Counter[str]()
        self._class_width = max(len("class"), *map(len, card.classes))
        names = policy.rules.bins if policy else card.bins.values()
        self._bin_width = max([len("bin"), *map(len, names)]) + (len(" (hazard)") if policy else 0)
        self.num_classified, self.num_failed, self._num_unlike = 0, 0, 0
        self._sum_of_percentiles = 0.0
        self._failures: list[Failure] = []  # the first few
        self.tolerated = list[str]()  # JPEGs that are classified in spite of faulty markers

    def add(self, prediction: Prediction) -> None:
        if isinstance(prediction, Failure):
            self.num_failed += 1
            if len(self._failures) < _FAILURES_LISTED:
                self._failures.append(prediction)
            return
        if self.num_classified == 0:
            following = ["next"] + [""] * (self._top - 2) if self._top > 1 else []
            self._print("class", "bin", "sure", "unlike", following, "file")
        self.num_classified += 1
        is_unlike = prediction.unlike is not None and prediction.unlike >= UNLIKE_FROM
        self._num_unlike += is_unlike
        self._sum_of_percentiles += prediction.unlike or 0.0
        unlike = "" if prediction.unlike is None else f"{prediction.unlike:.1f}{'!' if is_unlike else ' '}"
        best, *others = np.argsort(-prediction.probabilities, kind="stable")[: self._top]
        name = self._card.classes[best]
        following = [f"{_printable(self._card.classes[k])} {percent(prediction.probabilities[k])}" for k in others]
        sure = percent(prediction.probabilities[best])
        bin_name = _printable(self._card.bins.get(name, "-"))
        if decision := prediction.decision:
            self._decided[decision.bin] += 1
            bin_name = _printable(decision.bin) + (f" ({decision.why})" if decision.why else "")
        self._print(_printable(name), bin_name, sure, unlike, following, _printable(prediction.path))

    def finish(self, written: list[Path]) -> None:
        """Print the unreadable files and the totals."""
        if self.num_failed:
            print(f"\n{self.num_failed} could not be read:")
            for failure in self._failures:
                print(f"  {_printable(failure.path)}: {inert(failure.reason)}")
            if self.num_failed > len(self._failures):
                rest = self.num_failed - len(self._failures)
                print(f"  and {rest} more" + ("" if written else "; --csv FILE or --json FILE lists them all"))
        print(f"\n{self.num_classified} classified, {self.num_failed} unreadable")
        if self.tolerated:
            print(
                f"{len(self.tolerated):,} JPEG(s) have faulty markers and are classified, since all their pixels "
                f"decode: {_printable(self.tolerated[0])}"
            )
        if self._training and self.num_classified:
            mean = self._sum_of_percentiles / self.num_classified
            print(self._training.verdict(mean, self._num_unlike, self.num_classified))
        elif self.num_classified:
            print(f"unlikeness: not known, the model has no features of its training images; {HOW_TO_ADD_FEATURES}")
        if self._decided:
            print("decisions: " + ", ".join(f"{count:,} {_printable(name)}" for name, count in self._decided.items()))
        for path in written:
            print(f"written: {path}")

    def _print(self, name: str, bin_name: str, sure: str, unlike: str, following: list[str], path: str) -> None:
        columns = [f"{name:<{self._class_width}}"]
        if self._card.bins or self._policy:
            columns.append(f"{bin_name:<{self._bin_width}}")
        columns.append(f"{sure:>7}")
        if self._training:
            columns.append(f"{unlike:>6}")
        columns += [f"{one:<{self._class_width + 8}}" for one in following]
        print("  ".join([*columns, path]))


class CsvRecord:
    """Columns: path, class, bin, probability, probability of each class, unlike, error.

    `unlike` is empty if it is not known, and the error on success. With `decides`, these columns precede the error:
    decision (a bin or `person`), bin_probability, and why (hazard, cost, doubt, or empty).
    """

    def __init__(self, file: IO[str], card: BundleCard, *, decides: bool = False) -> None:
        self._file, self._card, self._decides = file, card, decides
        self._writer = CsvWriter(file)
        self._writer.write(csv_columns(card, decides=decides))

    def add(self, prediction: Prediction) -> None:
        with storage("writing the predictions", self._file.name):
            self._writer.write(csv_cells(prediction, self._card, decides=self._decides))


class JsonRecord:
    """One object: the model, the test-time augmentation, and a list with one line for each image."""

    def __init__(self, file: IO[str], card: BundleCard, tta: str) -> None:
        self._file, self._card, self._num_added = file, card, 0
        model = {"arch": card.arch, "weights": card.hashes.weights, "classes": list(card.classes)}
        file.write(f'{{"model": {json.dumps(model, ensure_ascii=False)},\n"tta": {json.dumps(tta)},\n"predictions": [')

    def add(self, prediction: Prediction) -> None:
        entry = json_entry(prediction, self._card)
        with storage("writing the predictions", self._file.name):
            self._file.write(("," if self._num_added else "") + "\n" + json.dumps(entry, ensure_ascii=False))
        self._num_added += 1

    def finish(self) -> None:
        self._file.write("\n]}\n")


def csv_columns(card: BundleCard, *, decides: bool) -> list[str]:
    """Return the names of the columns; see `CsvRecord`."""
    names = (f"p_{name}" for name in card.classes)
    return ["path", "class", "bin", "probability", *names, "unlike", *(_DECIDED if decides else ()), "error"]


def csv_cells(prediction: Prediction, card: BundleCard, *, decides: bool) -> list[Any]:
    """Return a row of the columns of `csv_columns`."""
    if isinstance(prediction, Failure):
        num_empty = 4 + len(card.classes) + (len(_DECIDED) if decides else 0)
        return [prediction.path, *[""] * num_empty, prediction.reason]
    best = int(prediction.probabilities.argmax())
    name = card.classes[best]
    probabilities = prediction.probabilities  # float32: as many digits as reading it back exactly needs
    unlike = "" if prediction.unlike is None else f"{prediction.unlike:.1f}"
    found = prediction.decision
    decided = [found.bin, f"{found.probability:.6g}", found.why] if found else []
    bin_name = card.bins.get(name, "")
    return [prediction.path, name, bin_name, probabilities[best], *probabilities, unlike, *decided, ""]


def json_entry(prediction: Prediction, card: BundleCard) -> dict[str, Any]:
    """Return the object of one image."""
    if isinstance(prediction, Failure):
        return {"path": prediction.path, "error": prediction.reason}
    shares = dict(zip(card.classes, map(as_float, prediction.probabilities), strict=True))
    name = card.classes[int(prediction.probabilities.argmax())]
    entry: dict[str, Any] = {
        "path": prediction.path,
        "class": name,
        "bin": card.bins.get(name),
        "probability": shares[name],
        "probabilities": shares,
        "unlike": None if prediction.unlike is None else round(float(prediction.unlike), 1),
        "error": None,
    }
    if found := prediction.decision:
        entry |= {"decision": found.bin, "bin_probability": round(found.probability, 6), "why": found.why}
    return entry


@contextmanager
def csv_record(path: Path, card: BundleCard, *, decides: bool = False) -> Iterator[CsvRecord]:
    # A byte of a file name that is not UTF-8 becomes \\udcXX; json.loads makes Python's name of that file of it.
    with written_whole(path, errors="backslashreplace") as file:
        yield CsvRecord(file, card, decides=decides)


@contextmanager
def json_record(path: Path, card: BundleCard, *, tta: str = "none") -> Iterator[JsonRecord]:
    with written_whole(path, errors="backslashreplace") as file:
        record = JsonRecord(file, card, tta)
        yield record
        record.finish()


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
        raise _unusable(f"{path} is not a CSV file: {error}") from error
    name = next((column for column in ("source", "path") if column in columns), None)
    found = [column[2:] for column in columns if column.startswith("p_")]
    if name is None or sorted(found) != sorted(classes):
        raise _unusable(
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
            raise _unusable(f"{path}, line {number}: {error or 'it is incomplete'}") from error
        paths.append(row[name])
        probabilities.append(shares)
    if 0 < len(unlike) < len(paths):
        raise _unusable(f"{path}: the column `unlike` is empty in {len(paths) - len(unlike)} of {len(paths)} rows")
    return SavedPredictions(
        tuple(paths),
        # The file has the shortest digits of each float32, so these are the numbers that `evaluate` decided by.
        np.array(probabilities, np.float32).astype(np.float64).reshape(-1, len(classes)),
        np.array(labels, np.int64) if "true" in columns else None,
        np.array(unlike) if unlike else None,
        np.array(groups, np.int32) if "group" in columns else None,
        tuple(unreadable),
    )


def _printable(path: str) -> str:
    """Return the path, escaped if it has characters that a terminal would interpret or cannot show."""
    return path if path.isprintable() else ascii(path)


def _unusable(found: str) -> RunError:
    return RunError(
        found,
        "the probability of each class is not known",
        "give a predictions.csv of `wasteddp evaluate`, or a file of `wasteddp predict --csv`, of a model with these "
        "classes",
    )
