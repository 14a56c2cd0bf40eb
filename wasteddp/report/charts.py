"""The geometry of curves and axes. The template draws it.

A plot is a square of 1000 x 1000 units, y downwards, that the page stretches to any size. Text is HTML around it, so
that it is readable on a phone and on paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log10
from typing import Any

import numpy as np

from wasteddp.report.run_record import F64, RunRecord, bucket_means, kept_rows, log_ticks, ticks

_BUCKETS = 400  # of one line; a plot is about this many pixels wide on a phone, and twice as many on a desktop
_MEANS = 80
_ALL_DOTTED = 40  # points; a line with at most this many has dots


@dataclass(frozen=True, slots=True)
class Form:
    """What a chart shows and how."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    percent: bool = False
    log: bool = False
    from_zero: bool = False
    about: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One metric of one run."""

    name: str
    colour: int  # of the palette, from 1
    points: str  # path of logged rows
    means: str  # path of means; '' if the points are few enough to be the line
    dots: str  # path of dots
    steps: list[int]  # of the points
    values: list[float]
    steps_per_epoch: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A tick or a vertical line: its position, 0..100 %, and its text."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot with its axes."""

    form: Form
    lines: tuple[Line, ...]
    x_marks: tuple[Mark, ...]
    y_marks: tuple[Mark, ...]
    starts: tuple[Mark, ...]  # restarts of the run
    x_range: tuple[float, float]  # epochs
    y_range: tuple[float, float]  # in the scale of the chart: logarithms if it is logarithmic
    about: str

    def to_json(self) -> dict[str, Any]:
        """Return the data that the page's script needs to show values under the pointer."""
        return {
            "x": self.x_range,
            "y": self.y_range,
            "log": self.form.log,
            "percent": self.form.percent,
            "lines": [
                {
                    "name": one.name,
                    "colour": one.colour,
                    "steps": one.steps,
                    "values": one.values,
                    "per": one.steps_per_epoch,
                }
                for one in self.lines
            ],
        }


def chart(form: Form, runs: Sequence[RunRecord], *, names: Sequence[str]) -> Chart | None:
    """Return the chart of a form, with a line for each run and metric that has rows; None if there are no rows.

    Args:
        names: of the lines, run by run, metric by metric.
    """
    found = []
    for number, (run, metric) in enumerate((run, metric) for run in runs for metric in form.metrics):
        values = run.column(metric)
        there = np.isfinite(values) & ((values > 0) | (not form.log))
        if there.any():
            found.append((number, names[number], run, run.columns["step"][there], values[there]))
    if not found:
        return None
    buckets = max(50, _BUCKETS // max(1, len(found) // 2))
    x_low = min(float(steps[0]) / run.steps_per_epoch for _, _, run, steps, _ in found)
    x_high = max(float(steps[-1]) / run.steps_per_epoch for _, _, run, steps, _ in found)
    x_range = (0.0 if x_low < 0.2 * x_high else x_low, x_high) if x_high > x_low else (x_low - 0.5, x_low + 0.5)
    y_range = _y_range(form, np.concatenate([values for *_, values in found]))
    lines, thinned = [], 0
    for number, name, run, steps, values in found:
        kept = kept_rows(values, buckets)
        thinned = max(thinned, len(values) if len(kept) < len(values) else 0)
        lines.append(_line(name, number + 1, run, (steps, values, kept), x_range, y_range, log=form.log))
    about = [form.about] if form.about else []
    if thinned:
        about.append(f"Of {thinned:,} rows, the smallest and the largest of each of {buckets} parts are drawn.")
    if any(line.means for line in lines):
        longest = max(len(values) for *_, values in found)
        about.append(f"Bold: means of {longest / _MEANS:.3g} rows each.")
    return Chart(
        form=form,
        lines=tuple(lines),
        x_marks=tuple(_marks(ticks(*x_range, most=8), x_range, _short)),
        y_marks=_y_marks(form, y_range),
        starts=_starts(runs[0], x_range) if len(runs) == 1 else (),
        x_range=x_range,
        y_range=y_range,
        about=" ".join(about),
    )


def _line(
    name: str,
    colour: int,
    run: RunRecord,
    rows: tuple[F64, F64, Any],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    log: bool,
) -> Line:
    steps, values, kept = rows
    x = _scaled(steps / run.steps_per_epoch, x_range)
    y = 1000 - _scaled(np.log10(values) if log else values, y_range)
    many = len(values) > 2 * _MEANS
    means = bucket_means(np.log10(values) if log else values, _MEANS)
    return Line(
        name=name,
        colour=(colour - 1) % 8 + 1,
        points=_path(x[kept], y[kept]),
        means=_path(bucket_means(x, _MEANS), 1000 - _scaled(means, y_range)) if many else "",
        dots=_dots(x, y) if len(values) <= _ALL_DOTTED else "",
        steps=steps[kept].astype(int).tolist(),
        values=[float(f"{value:.6g}") for value in values[kept]],
        steps_per_epoch=run.steps_per_epoch,
    )


def _y_range(form: Form, values: F64) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if form.log:
        low, high = log10(low), log10(high)
    elif form.from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or (abs(high) * 0.1 or 1.0)
    low, high = (low if form.from_zero and low == 0 else low - margin), high + margin
    if form.percent:
        low, high = max(low, 0.0), min(high, 1.0) if high <= 1.06 else high
    return low, high


def _y_marks(form: Form, y_range: tuple[float, float]) -> tuple[Mark, ...]:
    if form.log:
        found = log_ticks(10 ** y_range[0], 10 ** y_range[1])
        return tuple(Mark(float(_scaled(np.array([log10(one)]), y_range)[0]) / 10, _short(one)) for one in found)
    return tuple(_marks(ticks(*y_range, most=5), y_range, _percent if form.percent else _short))


def _marks(values: list[float], span: tuple[float, float], words: Callable[[float], str]) -> list[Mark]:
    places = _scaled(np.array(values), span) / 10
    return [Mark(float(f"{place:.2f}"), words(value)) for place, value in zip(places, values, strict=True)]


def scaled_path(x: F64, y: F64, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    """Return the path of a curve in the units of a plot."""
    return _path(_scaled(x, x_range), 1000 - _scaled(y, y_range))


def scale_marks(values: list[float], span: tuple[float, float]) -> tuple[Mark, ...]:
    """Return the marks of shares on an axis of `span`."""
    return tuple(_marks(values, span, _percent))


def _starts(run: RunRecord, x_range: tuple[float, float]) -> tuple[Mark, ...]:
    """Return the points where the attempt number changes: the run was killed or stopped there and continued."""
    attempts = run.column("attempt")
    changes = [row for row in range(1, run.num_rows) if attempts[row] > attempts[row - 1]]
    places = _scaled(run.columns["step"][changes] / run.steps_per_epoch, x_range) / 10
    return tuple(
        Mark(float(f"{place:.2f}"), f"start {attempts[row]:.0f}") for place, row in zip(places, changes, strict=True)
    )


def _scaled(values: F64, span: tuple[float, float]) -> F64:
    """Scale values to 0..1000 of a plot."""
    return (values - span[0]) / (span[1] - span[0]) * 1000


def _path(x: F64, y: F64) -> str:
    return "M" + "L".join(f"{a:.0f} {b:.0f}" for a, b in zip(x, y, strict=True))


def _dots(x: F64, y: F64) -> str:
    """Return lines of length zero with round ends. They stay round when the plot is stretched."""
    return "".join(f"M{a:.0f} {b:.0f}h0" for a, b in zip(x, y, strict=True))


def _short(value: float) -> str:
    """1200000 -> 1.2M, 0.05 -> 0.05, 0.0001 -> 1e-4"""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            return f"{value / size:g}{letter}"
    return f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
