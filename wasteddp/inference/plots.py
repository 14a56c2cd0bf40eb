"""Pictures of results. matplotlib without a display and without its global state (no pyplot)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from wasteddp.inference.metrics import I64

_LONGEST_NAME = 28  # characters; beyond it the names would take more room than the matrix
_MOST_SLANTED = 16  # classes; beyond it slanted names would run into each other, upright ones do not


def confusion_png(confusion: I64, classes: Sequence[str], *, title: str) -> bytes:
    """A confusion matrix [K, K] as PNG: counts in the cells, colour by the share of the row's samples.

    Colour goes by row, so that a rare class is as visible as a frequent one: the diagonal shows each class's recall.
    """
    num_classes = len(classes)
    support = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, support, out=np.zeros(confusion.shape), where=support > 0)
    names = [_shortened(name) for name in classes]

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
            label.set_rotation_mode("anchor")  # the name's end, not its middle, stands under the column
    axes.set_yticks(
        ticks, labels=[f"{name} ({n})" for name, n in zip(names, support[:, 0], strict=True)], parse_math=False
    )
    axes.set(xlabel="predicted", ylabel="true (samples)")
    axes.set_title(title, parse_math=False, fontsize=11)

    digits = len(str(confusion.max(initial=0)))
    size_pt = min(10.0, 72 * cell_in * 0.8 / (0.62 * digits))  # a digit is 0.62 of its size wide
    for row, column in zip(*np.nonzero(confusion), strict=True):  # empty cells stay empty: zeros hide the mistakes
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=colour, fontsize=size_pt)

    picture = io.BytesIO()
    with warnings.catch_warnings():
        # matplotlib's font lacks some scripts and shows boxes for them; the CSV beside the picture has the names
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(picture, format="png", bbox_inches="tight")
    return picture.getvalue()


def _shortened(name: str) -> str:
    """A long name without its middle: names often differ in their last word."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}…{name[-half + 1 :]}"
