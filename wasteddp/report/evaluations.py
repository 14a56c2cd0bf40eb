"""One evaluation on the page: classes with their intervals, confusions, reliability, mistakes with thumbnails.

Legend: K classes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from wasteddp.data.decoding.decode import UndecodableError, decode_rgb
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.decisions.intervals import describe_groups, wilson_interval
from wasteddp.errors import WastedError
from wasteddp.inference.metrics import percent
from wasteddp.report.run_record import RunRecord

_MISTAKES_SHOWN = 12  # of each kind
_CONFUSIONS_NAMED = 5
_LARGEST_MATRIX = 40  # classes; a larger table of K x K is neither readable nor small
SIDE_PX = 176  # sharp enough to recognise the object, also on a screen with two pixels per point
_QUALITY = 78  # about 5 KB per thumbnail


@dataclass(frozen=True, slots=True)
class Share:
    """A proportion with its 95 % interval, all in percent. `value` is None for 0 / 0."""

    value: float | None
    low: float
    high: float

    @classmethod
    def from_counts(cls, part: int, whole: int, interval: Sequence[float] | None = None) -> Share:
        """Return part / whole with an interval, by default Wilson's. `interval` is in 0..1."""
        if whole == 0:
            return cls(None, 0.0, 100.0)
        low, high = interval or wilson_interval(part, whole)
        return cls(100 * part / whole, 100 * low, 100 * high)


@dataclass(frozen=True, slots=True)
class ClassRow:
    name: str
    bin: str
    images: int
    recall: Share
    precision: Share
    f1: str


def evaluation_context(one: RunRecord, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables for one evaluation."""
    surest = record["surest_mistakes"][:_MISTAKES_SHOWN]
    there = {mistake["sample"] for mistake in surest}
    worst = [mistake for mistake in record["worst_mistakes"] if mistake["sample"] not in there][:_MISTAKES_SHOWN]
    samples = [mistake["sample"] for mistake in (*surest, *worst)]
    shown, missing = thumbnails(one.manifest, record, samples)
    bars = reliability_bars(record["reliability"])
    sure = sum(bar.confidence * bar.count for bar in bars) / max(1, sum(bar.count for bar in bars))
    return {
        "record": record,
        "split": record["options"]["split"],
        "chosen_on": record["options"]["split"] == one.settings.get("data.eval_split"),
        "by_training": record["options"].get("by") == "training",
        "stale": is_stale(one, record["hashes"]["weights"]),
        "calibrated_since": one.card is not None
        and record["hashes"]["weights"] == one.card.hashes.weights
        and record["model"]["temperature"] != one.card.temperature,
        "temperature_now": one.card.temperature if one.card else 1.0,
        "intervals": describe_groups(record.get("groups")),
        "classes": _class_rows(one, record),
        "matrix": _matrix(record),
        "longest_name": min(14, max(map(len, record["classes"]))),
        "confusions": _confusions(record),
        "bars": bars,
        "mean_confidence": sure,
        "surest": surest,
        "worst": worst,
        "num_wrong": record["num_samples"] - record["num_correct"],
        "thumbnails": shown,
        "thumbnails_missing": missing,
    }


def is_stale(one: RunRecord, weights: str) -> bool:
    """Whether an evaluation of these weights is not of the run's current model."""
    return one.card is not None and weights != one.card.hashes.weights


def _class_rows(run: RunRecord, record: Mapping[str, Any]) -> list[ClassRow]:
    """Return a row for each class of an evaluation, with intervals of its metrics."""
    confusion = np.asarray(record["confusion"])
    bins = run.card.bins if run.card else {}
    groups = record.get("groups") or {}
    unknown: list[Any] = [None] * len(confusion)
    recalls, precisions = (groups.get(name) or unknown for name in ("recall", "precision"))
    counts = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist(), strict=True)
    return [
        ClassRow(
            name=name,
            bin=bins.get(name, ""),
            images=true,
            recall=Share.from_counts(hits, true, of_recall),
            precision=Share.from_counts(hits, predicted, of_precision),
            f1="–" if figures["f1"] is None else percent(figures["f1"]),
        )
        for name, figures, (hits, true, predicted), of_recall, of_precision in zip(
            record["classes"], record["per_class"], counts, recalls, precisions, strict=True
        )
    ]


def _matrix(record: Mapping[str, Any]) -> list[list[tuple[int, float]]]:
    """Return (count, share of its row) of each cell; [] if there are too many classes to show."""
    confusion = np.asarray(record["confusion"], np.int64)
    if len(confusion) > _LARGEST_MATRIX:
        return []
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    return [list(zip(row, share, strict=True)) for row, share in zip(confusion.tolist(), shares.tolist(), strict=True)]


def _confusions(record: Mapping[str, Any]) -> list[tuple[str, str, int, str]]:
    """Return (true, predicted, images, share of the true class), the most frequent first."""
    confusion, classes = np.array(record["confusion"], np.int64), record["classes"]
    support = confusion.sum(1)
    np.fill_diagonal(confusion, 0)
    largest = np.argsort(-confusion, axis=None, kind="stable")[:_CONFUSIONS_NAMED]
    pairs = [divmod(int(cell), len(classes)) for cell in largest]
    return [
        (classes[true], classes[guess], int(confusion[true, guess]), percent(confusion[true, guess] / support[true]))
        for true, guess in pairs
        if confusion[true, guess]
    ]


@dataclass(frozen=True, slots=True)
class ReliabilityBar:
    """One bin of confidence. All positions and shares are in 0..100 % of the diagram."""

    left: float
    width: float
    count: int
    share: float  # number of predictions relative to the fullest bin
    accuracy: float
    low: float  # 95 % interval
    high: float
    confidence: float


def reliability_bars(record: Mapping[str, Any]) -> list[ReliabilityBar]:
    """Return the bins of an evaluation's "reliability" that have predictions."""
    fullest = max((one["count"] for one in record["bins"]), default=0)
    bars = []
    for one in record["bins"]:
        if one["count"]:
            low, high = wilson_interval(one["correct"], one["count"])
            bars.append(
                ReliabilityBar(
                    left=100 * one["from"],
                    width=100 * (one["to"] - one["from"]),
                    count=one["count"],
                    share=100 * one["count"] / fullest,
                    accuracy=100 * one["correct"] / one["count"],
                    low=100 * low,
                    high=100 * high,
                    confidence=100 * one["mean_confidence"],
                )
            )
    return bars


def thumbnails(
    manifest: Manifest | None, record: Mapping[str, Any], samples: Sequence[int]
) -> tuple[dict[int, str], str]:
    """Return `data:` URLs of samples of an evaluation's split, and why some or all are missing, or ''.

    Args:
        manifest: manifest of the shard set as it is now. Another set would show other samples, so it is not used.
        record: record of the evaluation.
    """
    if not samples:
        return {}, ""
    if manifest is None:
        return {}, "the shard set cannot be read"
    if manifest.sha256 != record["hashes"]["manifest"]:
        return {}, f"{manifest.folder} is no longer the shard set that was evaluated"
    found: dict[int, str] = {}
    try:
        with SplitReader(manifest, record["options"]["split"]) as reader:
            for sample in samples:
                found[sample] = data_url(reader.read(sample))
    except (WastedError, UndecodableError) as error:
        return found, str(error).splitlines()[0]
    return found, ""


def data_url(data: bytes, *, side_px: int = SIDE_PX, quality: int = _QUALITY) -> str:
    """Return a `data:` URL with a small JPEG of an image file; its longer side has at most `side_px`.

    Raises:
        UndecodableError: see `decode_rgb`.
    """
    image = Image.fromarray(decode_rgb(data))
    image.thumbnail((side_px, side_px))
    small = io.BytesIO()
    image.save(small, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()
