"""The results of an evaluation: a table on the terminal and four files.

    runs/<name>/evaluations/<split>/
        metrics.json       all metrics, the confusion matrix, the worst mistakes, and what they were measured on
        confusion.csv      rows true, columns predicted
        confusion.png      a plot of the same
        predictions.csv    each image: true class, predicted class, probability of each class; unlikeness and number of
                           its group, if known
        decisions.json     with --bins, --max-error or --policy: see `sorting`; written last
        policy.json        with them too; stays until another policy is written, because `predict` may use it

Training also writes the first two, of its best model on its evaluation split; only `wasteddp evaluate` writes the
others. metrics.json is removed first and written last: a folder that has it is complete, and all its files except
policy.json are from one evaluation. The files do not depend on the time: the same model and images give the same bytes.

The plot is drawn by matplotlib without a display and without its global state (no pyplot).
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

from wasteddp import __version__
from wasteddp.decisions.intervals import SampleGroups
from wasteddp.errors import joined, storage, visible
from wasteddp.files import CsvWriter, make_folder, read_regular, write_atomically
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.metrics import F32, I64, Metrics, Mistake, Seen, percent

FORMAT = "wasteddp-evaluation"
FORMAT_VERSION = 1
_FILES = (
    "metrics.json", "confusion.csv", "confusion.png", "predictions.csv", "decisions.json",
)  # fmt: skip
_LARGEST_PRINTED_MATRIX = 12  # classes: wider ones do not fit in 80 columns
_LONGEST_NAME = 28  # characters; longer names would take more space than the matrix
_MOST_SLANTED = 16  # classes; with more, slanted names would overlap, upright ones do not


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The metrics of a model on a split, and its predictions. N samples in the split's order, K classes."""

    seen: Seen
    sources: tuple[str, ...]  # [N]
    labels: npt.NDArray[np.int32]  # [N]
    probabilities_NK: F32
    unlike_N: npt.NDArray[np.float64] | None = None  # percentiles, 0 to 100; None: not known
    groups: SampleGroups | None = None  # None: the samples have no groups


def save_evaluation(
    folder: Path,
    evaluation: Evaluation,
    card: BundleCard,
    *,
    manifest_sha256: str,
    options: Mapping[str, Any],
    further: Mapping[str, Any] | None = None,
) -> None:
    """Write the four files of one evaluation.

    Args:
        further: more to record in metrics.json.
    """
    seen, classes = evaluation.seen, evaluation.seen.classes
    _clear(folder)
    title = f"{seen.split}: {percent(seen.metrics.accuracy)} of {seen.metrics.num_samples} images correct"
    write_atomically(folder / "confusion.png", confusion_png(seen.confusion, classes, title=title))
    predicted = evaluation.probabilities_NK.argmax(axis=1)
    more: dict[str, list[str]] = {}
    if evaluation.unlike_N is not None:
        more["unlike"] = [f"{one:.1f}" for one in evaluation.unlike_N]
    if evaluation.groups is not None:
        more["group"] = [str(number) for number in evaluation.groups.numbers_N]
    further_N = zip(*more.values(), strict=True) if more else ([] for _ in predicted)
    rows = zip(evaluation.sources, evaluation.labels, predicted, evaluation.probabilities_NK, further_N, strict=True)
    write_atomically(
        folder / "predictions.csv",
        _csv(
            [["source", "true", "predicted", *(f"p_{name}" for name in classes), *more]],
            ([source, classes[true], classes[guess], *p, *rest] for source, true, guess, p, rest in rows),
        ),
    )
    _save_figures(folder, seen, evaluation.sources.__getitem__, card, manifest_sha256, options, further or {})


def save_seen(
    folder: Path,
    seen: Seen,
    source_of: Callable[[int], str],
    card: BundleCard,
    *,
    manifest_sha256: str,
    options: Mapping[str, Any],
) -> None:
    """Write the metrics of an evaluation without its predictions. Remove the files of the previous evaluation."""
    _clear(folder)
    _save_figures(folder, seen, source_of, card, manifest_sha256, options, {})


def _clear(folder: Path) -> None:
    with storage("saving the evaluation", folder):
        make_folder(folder)
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
            (folder / f"{name}.tmp").unlink(missing_ok=True)  # left by a kill


def _save_figures(
    folder: Path,
    seen: Seen,
    source_of: Callable[[int], str],
    card: BundleCard,
    manifest_sha256: str,
    options: Mapping[str, Any],
    further: Mapping[str, Any],
) -> None:
    """Write confusion.csv, then metrics.json."""
    classes = seen.classes
    write_atomically(
        folder / "confusion.csv",
        _csv(
            [["true \\ predicted", *classes]],
            ([name, *row] for name, row in zip(classes, seen.confusion, strict=True)),
        ),
    )

    def describe(mistake: Mistake) -> dict[str, Any]:
        return {
            "sample": mistake.sample,
            "source": source_of(mistake.sample),
            "true": classes[mistake.true],
            "predicted": classes[mistake.predicted],
            "probability": mistake.confidence,
            "probability_of_true": mistake.of_truth,
        }

    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool": f"wasteddp {__version__}",
        "options": dict(options),
        "hashes": {
            "manifest": manifest_sha256,
            "manifest_trained_on": card.hashes.manifest,
            "weights": card.hashes.weights,
        },
        "model": {"arch": card.arch, "temperature": card.temperature, "trained": asdict(card.trained)},
        "classes": list(classes),
        **seen.metrics.to_json(),
        "confusion": seen.confusion.tolist(),
        "reliability": seen.reliability.to_json(),
        "surest_mistakes": [describe(mistake) for mistake in seen.mistakes.surest],
        "worst_mistakes": [describe(mistake) for mistake in seen.mistakes.worst],
        **further,
    }
    content = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / "metrics.json", content.encode("utf-8", "backslashreplace"))


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


Count = Annotated[int, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Mistake(_Model):
    sample: Count
    source: str
    true: str
    predicted: str
    probability: Share
    probability_of_true: Share


class _ClassFigures(_Model):
    precision: Share | None
    recall: Share | None
    f1: Share | None
    support: Count


class _Bin(_Model):
    left: float = Field(alias="from")
    right: float = Field(alias="to")
    count: Count
    correct: Count
    mean_confidence: Share | None

    @model_validator(mode="after")
    def _fits(self) -> _Bin:
        if self.correct > self.count or (self.count and self.mean_confidence is None):
            raise ValueError("its counts do not fit together")
        return self


class ReliabilityRecord(_Model):
    """A record of `Reliability.to_json`."""

    expected_calibration_error: float
    bins: list[_Bin]


Ends = Annotated[list[Share], Field(min_length=2, max_length=2)]


class _Groups(_Model):
    rule: str
    num_groups: Count
    recall: list[Ends | None] = Field(default_factory=list)  # of each class, or empty
    precision: list[Ends | None] = Field(default_factory=list)


class _Record(_Model):
    """The part of metrics.json that the report shows."""

    options: dict[str, Any]
    hashes: dict[str, str]
    model: dict[str, Any]
    classes: list[str] = Field(min_length=1)
    num_samples: Count
    num_correct: Count
    accuracy: Share
    accuracy_low: Share
    accuracy_high: Share
    macro_f1: Share | None
    macro_recall: Share | None
    per_class: list[_ClassFigures]
    confusion: list[list[Count]]
    reliability: ReliabilityRecord
    surest_mistakes: list[_Mistake]
    worst_mistakes: list[_Mistake]
    groups: _Groups | None = None

    @model_validator(mode="after")
    def _fits(self) -> _Record:
        k = len(self.classes)
        if {len(self.per_class), len(self.confusion), *map(len, self.confusion)} != {k}:
            raise ValueError(f"it has {k} classes, and tables of another size")
        if self.groups and not {len(self.groups.recall), len(self.groups.precision)} <= {0, k}:
            raise ValueError(f"it has {k} classes, and intervals over groups of another number")
        if not isinstance(self.options.get("split"), str) or not {"manifest", "weights"} <= self.hashes.keys():
            raise ValueError("it does not name its split, manifest and weights")
        if not isinstance(self.model.get("trained"), dict) or not isinstance(self.model["trained"].get("step"), int):
            raise ValueError("it does not name the step of its model")
        if not isinstance(self.model.get("temperature"), int | float):
            raise ValueError("it does not name the temperature of its model")
        return self


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a metrics.json after a check of all that the report uses.

    Raises:
        ValueError: it is not the record of an evaluation in this format.
        OSError: it cannot be read.
    """
    try:
        record: dict[str, Any] = json.loads(read_regular(path))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("format_version") != FORMAT_VERSION:
        raise ValueError("another version wrote it: evaluate again")
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return record


def print_evaluation(console: Console, seen: Seen, *, title: str) -> None:
    """Print the metrics as tables."""
    print_metrics(console, seen.metrics, seen.classes, seen.confusion, title=title)


def print_metrics(console: Console, metrics: Metrics, classes: Sequence[str], confusion: I64, *, title: str) -> None:
    """Print the metrics and the confusion matrix as tables."""
    summary = Table(title=title, title_justify="left", show_header=False)
    summary.add_column()
    summary.add_column(justify="right")
    interval = f"{percent(metrics.accuracy_low)} to {percent(metrics.accuracy_high)}"
    summary.add_row("accuracy", f"{percent(metrics.accuracy)} ({metrics.num_correct} of {metrics.num_samples})")
    summary.add_row("95 % interval of it", interval)
    summary.add_row(f"macro F1, of {metrics.averaged}", percent(metrics.macro_f1))
    summary.add_row(f"macro recall (balanced accuracy), of {metrics.averaged}", percent(metrics.macro_recall))
    console.print(summary)
    absent = [name for name, one in zip(classes, metrics.per_class, strict=True) if not one.support]
    if absent:
        console.print(
            f"no images of {len(absent)} of the {len(classes)} classes: {joined(absent)}; "
            "the macro figures are means over the others",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip

    by_class = Table("class", title="by class", title_justify="left")
    for column in ("precision", "recall", "F1", "images"):
        by_class.add_column(column, justify="right")
    for name, one in zip(classes, metrics.per_class, strict=True):
        by_class.add_row(plain(name), percent(one.precision), percent(one.recall), percent(one.f1), str(one.support))
    console.print(by_class)

    if len(classes) <= _LARGEST_PRINTED_MATRIX:
        # Class names would make the columns wider than a terminal, so the columns have the rows' numbers.
        matrix = Table("true", title="confusion: rows true, columns predicted", title_justify="left")
        for number in range(1, len(classes) + 1):
            matrix.add_column(str(number), justify="right")
        for number, (name, row) in enumerate(zip(classes, confusion.tolist(), strict=True), start=1):
            matrix.add_row(f"{number} {plain(name)}", *(str(count) if count else "·" for count in row))
        console.print(matrix)


def plain(name: str) -> str:
    """Return a class name that neither rich nor a terminal interprets."""
    return visible(name).replace("[", "\\[")


def _csv(head: Iterable[Iterable[Any]], rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    writer = CsvWriter(text)
    for row in (*head, *rows):
        writer.write(row)  # a float32 is written with as many digits as reading it back exactly needs
    return text.getvalue().encode("utf-8", "backslashreplace")


def confusion_png(confusion: I64, classes: Sequence[str], *, title: str) -> bytes:
    """Draw a confusion matrix [K, K] as PNG, with counts in the cells, coloured by the share of the row's samples.

    Shares are by row, so that a rare class is as visible as a frequent one. The diagonal shows each class's recall.
    """
    from matplotlib.figure import Figure  # takes 0.3 s, and a training draws nothing

    num_classes = len(classes)
    support = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, support, out=np.zeros(confusion.shape), where=support > 0)
    names = [_shorten(name) for name in classes]

    cell_in = 0.75 if num_classes <= 12 else 0.45
    names_in = 0.085 * max(map(len, names))  # width of the longest name at 10 points
    side_in = max(3.0, cell_in * num_classes)
    figure = Figure(figsize=(side_in + names_in + 1.8, side_in + names_in + 1.3), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=25, pad=0.02, label="share of the true class")
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])

    ticks = range(num_classes)
    slanted = num_classes <= _MOST_SLANTED
    axes.set_xticks(
        ticks, labels=names, rotation=45 if slanted else 90, ha="right" if slanted else "center", parse_math=False
    )
    if slanted:
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")  # put the end of the name, not its middle, under the column
    axes.set_yticks(
        ticks, labels=[f"{name} ({n})" for name, n in zip(names, support[:, 0], strict=True)], parse_math=False
    )
    axes.set(xlabel="predicted", ylabel="true (samples)")
    axes.set_title(title, parse_math=False, fontsize=11)

    digits = len(str(confusion.max(initial=0)))
    size_pt = min(10.0, 72 * cell_in * 0.8 / (0.62 * digits))  # a digit is 0.62 of its size wide
    for row, column in zip(
        *np.nonzero(confusion), strict=True
    ):  # empty cells have no text: zeros would hide the mistakes
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=colour, fontsize=size_pt)

    png = io.BytesIO()
    with warnings.catch_warnings():
        # matplotlib's font lacks some scripts and shows boxes for them; confusion.csv has the names
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(png, format="png", bbox_inches="tight")
    return png.getvalue()


def _shorten(name: str) -> str:
    """Return a long name without its middle: names often differ in their last word."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}…{name[-half + 1 :]}"
