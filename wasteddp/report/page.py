"""The HTML pages of `wasteddp report` and `wasteddp review`: each is one file that needs no server and no network.

The content security policy of the pages forbids every request. The report, of one or several runs, is complete without
its script, which only shows values under the pointer.

On the page of `wasteddp review` a person confirms, corrects or drops the labels of pictures. Decisions are kept in the
browser's localStorage, under a name that belongs to the shard set: a page that is written again continues. Saving
downloads a CSV with the columns path,label,class,action for `wasteddp shard --corrections`, or, of images that had no
label, one with path,label, which `wasteddp shard` reads as a source.
"""

from __future__ import annotations

import base64
import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from wasteddp import __version__
from wasteddp.errors import RunError
from wasteddp.files import write_atomically
from wasteddp.parallel import duration
from wasteddp.report import tables
from wasteddp.report.charts import Chart, Form, chart
from wasteddp.report.decisions import calibration_rows, calibration_sentence, decide_again, decisions_context
from wasteddp.report.evaluations import evaluation_context
from wasteddp.report.run_record import RunRecord, read_run
from wasteddp.training.tracking.journal import METRICS

_HERE = Path(__file__).parent
_MOST_LINES = 8  # as many colours as can be distinguished
# A * matches a class or a rank, as in METRICS.
_FORMS = (
    Form("Loss", ("train/loss", "val/loss"), "nats"),
    Form("Accuracy and recall", ("val/accuracy", "val/macro_recall", "val/macro_f1"), percent=True),
    Form("Recall by class", ("val/recall/*",), percent=True),
    Form("Learning rate", ("lr",), from_zero=True),
    Form("Gradient norm", ("train/grad_norm",), log=True, about="Logarithmic."),
    Form("Speed", ("train/images_per_s",), "images/s", from_zero=True),
    Form("Speed by rank", ("rank/*/images_per_s",), "images/s", from_zero=True),
    Form("Waiting for data", ("train/wait_fraction", "train/wait_fraction_max"), "of the time", True, from_zero=True),
    Form("Starved of the GIL or a core", ("train/starved_fraction",), "of the forward pass", True, from_zero=True),
)
# Metrics without a chart: another part of the page shows them, or a chart would not make them clearer.
_NO_CHART = {
    "step", "time_s", "epoch", "attempt", "best/value", "val/samples", "val/seconds", "checkpoint/stall_ms",
    "checkpoint/seconds", "train/step_ms", "rank/*/wait_fraction",
}  # fmt: skip

# Of the page of `wasteddp review`.
PICTURE_SIDE_PX = 256
PICTURE_QUALITY = 75  # about 8 KB a picture at this side
_COMMAND_KEYS = "jkdusa"
# Keys of the first classes; other classes are chosen by their buttons.
_CLASS_KEYS = "1234567890" + "".join(letter for letter in string.ascii_lowercase if letter not in _COMMAND_KEYS)


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    bins: Path | None = None,
    max_error: float | None = None,
    confidence: float = 0.95,
    choose_on: str = "",
) -> Path:
    """Write `report.html` of one run, or `comparison.html` of several. Return its path.

    Args:
        bins: file of bins to decide by, instead of those of `wasteddp evaluate --bins`.
        max_error, confidence, choose_on: as in `wasteddp evaluate`, with `bins`.

    Raises:
        RunError: a folder is not a run's folder, there are too many runs, or predictions are missing for `bins`.
        DecisionError: the file of bins is wrong, or there are too few images for a guarantee.
    """
    if bins is None and (max_error is not None or choose_on):
        raise RunError(
            f"--{'choose-on' if choose_on else 'max-error'} was given without --bins",
            "it would have no effect: the report would show the decisions of the last `evaluate --bins`",
            "name the bins with --bins FILE",
        )
    if len(runs) > _MOST_LINES:
        raise RunError(
            f"{len(runs)} runs were named; one chart can show at most {_MOST_LINES}",
            "the lines of the charts could not be distinguished",
            "compare fewer runs",
        )
    path = out or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    found = [read_run(folder) for folder in runs]
    if bins is not None:
        found = [decide_again(one, bins, max_error=max_error, level=confidence, choose_on=choose_on) for one in found]
    write_atomically(path, render_report(found).encode("utf-8", "replace"))
    return path


def render_report(runs: Sequence[RunRecord]) -> str:
    """Return the HTML of the report of one run, or of the comparison of several."""
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    return _template("page.html").render(
        title=" · ".join(one.name for one in runs),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=_hash(script),
        tool=f"wasteddp {__version__}",
        comparison=_comparison(runs) if len(runs) > 1 else None,
        runs=[_run_context(one) for one in runs],
    )


def _run_context(one: RunRecord) -> dict[str, Any]:
    """Return the template's variables for one run."""
    word, explanation = tables.state(one)
    counts, named, unnamed = tables.left_out(one)
    settings = tables.settings_rows(one)
    return {
        "run": one,
        "state": word,
        "state_note": explanation,
        "tiles": tables.tiles(one),
        "charts": _charts(one),
        "evaluations": [evaluation_context(one, record) for record in one.evaluations],
        "decisions": [decisions_context(one, record) for record in _in_order(one)],
        "calibration": calibration_rows(one.card),
        "calibration_sentence": calibration_sentence(one.card),
        "left_out": counts,
        "left_out_named": named,
        "left_out_unnamed": unnamed,
        "starts": tables.starts(one),
        "timings": tables.timings(one),
        "settings": settings,
        "changed_settings": [(name, shown) for name, rows in settings if (shown := [row for row in rows if row[2]])],
        "lineage": tables.lineage(one),
        "environment": tables.environment_rows(one),
        "duration": duration,
    }


def _in_order(one: RunRecord) -> list[Mapping[str, Any]]:
    """Return the decisions in the order of the evaluations."""
    splits = [record["options"]["split"] for record in one.evaluations]
    return [one.decisions[split] for split in splits if split in one.decisions]


def _charts(one: RunRecord) -> list[Chart]:
    """Return the charts of `_FORMS`, then one for each other metric that changes."""
    known = [*_NO_CHART, *(metric for form in _FORMS for metric in form.metrics)]
    forms = list(_FORMS)
    for name in one.columns:
        if not any(fnmatchcase(name, pattern) for pattern in known) and len(set(one.logged(name))) > 1:
            unit, meaning = METRICS.get(name, ("", name))
            forms.append(Form(meaning[:1].upper() + meaning[1:], (name,), "" if unit == "1" else unit))
    found = []
    for form in forms:
        full = _expand(form, one)
        found.append(chart(full, [one], names=[_line_name(one, metric) for metric in full.metrics]))
    return [drawn for drawn in found if drawn]


def _expand(form: Form, one: RunRecord) -> Form:
    """Return a form with the run's metrics in place of each *, at most as many as there are colours."""
    names = [name for pattern in form.metrics for name in one.columns if fnmatchcase(name, pattern)]
    left = len(names) - _MOST_LINES
    about = f"{form.about} {left} more are in metrics.jsonl.".strip() if left > 0 else form.about
    return replace(form, metrics=tuple(names[:_MOST_LINES]), about=about)


def _line_name(one: RunRecord, metric: str) -> str:
    """val/macro_recall -> macro recall; train/loss -> train"""
    parts = metric.split("/")
    if parts[-1] == "loss":
        return str(one.settings.get("data.eval_split", "val")) if parts[0] == "val" else parts[0]
    if parts[0] == "rank":
        return f"rank {parts[1]}"
    return parts[-1] if "recall" in parts[:-1] else _words(parts[-1])


def _words(metric: str) -> str:
    """macro_f1 -> macro F1"""
    return metric.replace("/", " ").replace("_", " ").replace("f1", "F1")


def _comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the template's variables for a comparison of several runs."""
    names = _distinct([one.name for one in runs])
    splits = dict.fromkeys(record["options"]["split"] for one in runs for record in one.evaluations)
    forms = [
        Form(_comparison_title(form, metric), (metric,), form.unit, form.percent, form.log, form.from_zero, form.about)
        for form in _FORMS
        for metric in form.metrics
        if "*" not in metric
    ]
    sets = {record["hashes"]["manifest"] for one in runs for record in one.evaluations}
    return {
        "names": names,
        "splits": list(splits),
        "rows": [
            {
                "name": name,
                "state": tables.state(one)[0],
                "evaluations": {record["options"]["split"]: record for record in one.evaluations},
                "epochs": one.last_step / one.steps_per_epoch,
                "tiles": {tile.label: tile.value for tile in tables.tiles(one)},
            }
            for name, one in zip(names, runs, strict=True)
        ],
        "other_sets": len(sets) > 1,
        "settings": tables.different_settings(runs),
        "charts": [drawn for form in forms if (drawn := chart(form, runs, names=names))],
    }


def _comparison_title(form: Form, metric: str) -> str:
    return form.title if len(form.metrics) == 1 else _words(metric[:1].upper() + metric[1:])


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, with a number added to equal ones (runs with the same name in different folders)."""
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]


@dataclass(frozen=True, slots=True)
class Picture:
    """One image on the page of `wasteddp review`."""

    path: str  # in the source, as a CSV has it
    label: str  # empty: it has none
    suggested: str  # class that it probably has; empty: unknown
    top: tuple[tuple[str, float], ...] = ()  # the most probable classes and their probabilities
    url: str = ""  # `data:` URL; empty: the image cannot be shown
    split: str = ""
    file: str = ""  # of an image that is not in the shard set


@dataclass(frozen=True, slots=True)
class Part:
    """A section of the page of `wasteddp review`: cards of one picture, or of two that are compared."""

    name: str  # for links
    title: str
    about: str
    cards: Sequence[tuple[Picture, ...]]
    num_found: int  # with the cards that are not here
    empty: str  # text if nothing was found
    note: str = ""


def render_review(
    title: str, lead: str, warnings: Sequence[str], parts: Sequence[Part], classes: Sequence[str], *, store: str
) -> str:
    """Return the HTML of the page of `wasteddp review`.

    Args:
        store: identifies the shard set; the decisions in the browser are kept under it.
    """
    script, style, more_style = (
        (_HERE / name).read_text(encoding="utf-8") for name in ("review_page.js", "page.css", "review_page.css")
    )
    keys = _CLASS_KEYS[: len(classes)]
    return _template("review_page.html").render(
        title=title,
        lead=lead,
        warnings=warnings,
        parts=parts,
        classes=list(zip(classes, [*keys, *[""] * (len(classes) - len(keys))], strict=True)),
        store=store,
        style=style + more_style,
        script=script,
        script_hash=_hash(script),
        tool=f"wasteddp {__version__}",
    )


@cache
def _template(name: str) -> jinja2.Template:
    """Return a page's template. To compile it takes most of a page's time."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
