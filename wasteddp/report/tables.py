"""The tables of the page: main metrics, timings, starts, settings, lineage."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wasteddp.inference.metrics import percent
from wasteddp.parallel import duration
from wasteddp.report.run_record import RunRecord, flat
from wasteddp.settings import Settings

_LEFT_OUT_NAMED = 20


@dataclass(frozen=True, slots=True)
class Tile:
    """One number at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the run, from its rows."""

    number: int
    steps: str
    began: str
    ended: str
    seconds: float


def state(run: RunRecord) -> tuple[str, str]:
    """Return (word, explanation) for the state of the run, from the files in its folder."""
    epochs_asked = run.settings.get("train.epochs", 0)
    epochs = run.last_step / run.steps_per_epoch
    if run.resumable:
        return "stopped", "by a signal, and saved: the same command continues the run"
    if epochs_asked and epochs >= epochs_asked - 1e-6:
        return "finished", f"all {epochs_asked} epochs"
    patience = run.settings.get("train.early_stop_epochs", 0)
    if 0 < patience <= evaluations_since_best(run):
        return "finished", f"early: {patience} evaluations without an improvement"
    share = f"{epochs:.3g} of {epochs_asked} epochs" if epochs_asked else f"{run.last_step:,} steps"
    return "not finished", f"{share}: still running, killed, or ended by an error"


def evaluations_since_best(run: RunRecord) -> int:
    values = run.logged(f"val/{run.settings.get('evaluate.metric', 'accuracy')}")
    return len(values) - 1 - int(values.argmax()) if values.size else 0


def tiles(run: RunRecord) -> list[Tile]:
    """Return the numbers that a reader looks for first."""
    found = []
    for record in run.evaluations:
        interval = f"95 %: {100 * record['accuracy_low']:.1f} to {100 * record['accuracy_high']:.1f}"
        found.append(Tile(f"accuracy on {record['options']['split']}", percent(record["accuracy"]), interval))
    for record in run.evaluations[:1]:
        num_with, num_classes = sum(one["support"] > 0 for one in record["per_class"]), len(record["per_class"])
        of = f"of {num_with} of {num_classes} classes " if num_with < num_classes else ""
        found.append(Tile("macro recall", percent(record["macro_recall"]), f"{of}on {record['options']['split']}"))
    if run.card:
        found.append(
            Tile("best at step", f"{run.card.trained.step:,}", f"of {run.last_step:,}, by {run.card.trained.metric}")
        )
    speed = run.logged("train/images_per_s")
    if speed.size:
        found.append(Tile("images/s", f"{np.median(speed):,.4g}", "median of the rows"))
    waits = run.logged("train/wait_fraction")
    if waits.size:
        found.append(Tile("waiting for data", percent(float(waits.mean())), "mean of the rows"))
    total_s = sum(start.seconds for start in starts(run))
    if total_s:
        found.append(Tile("time", duration(total_s), "first row to last"))
    return found


def starts(run: RunRecord) -> list[Start]:
    """Return each start of the run that has rows. A resume removes the rows after its checkpoint."""
    attempts, times, steps = run.column("attempt"), run.column("time_s"), run.columns["step"]
    found = []
    for number in sorted({int(one) for one in attempts[np.isfinite(attempts)]}):
        rows = np.flatnonzero(attempts == number)
        first, last = rows[0], rows[-1]
        found.append(
            Start(
                number=number,
                steps=f"{steps[first]:,.0f} to {steps[last]:,.0f}",
                began=_clock(times[first]),
                ended=_clock(times[last]),
                seconds=float(times[last] - times[first]),
            )
        )
    return found


def timings(run: RunRecord) -> list[tuple[str, str]]:
    """Return how the time was spent, from the rows."""
    found = []
    step_ms, evaluation_s = run.logged("train/step_ms"), run.logged("val/seconds")
    stall_ms, write_s = run.logged("checkpoint/stall_ms"), run.logged("checkpoint/seconds")
    if step_ms.size:
        found.append(("a step, median of the rows", f"{np.median(step_ms):,.4g} ms"))
        found.append(("a step, slowest row", f"{step_ms.max():,.4g} ms"))
    if evaluation_s.size:
        found.append((f"{evaluation_s.size} evaluations", duration(float(evaluation_s.sum()))))
    if stall_ms.size:
        found.append(("longest wait for a checkpoint", f"{stall_ms.max():,.3g} ms"))
    if write_s.size:
        found.append(("longest write of a checkpoint, in the background", f"{write_s.max():,.3g} s"))
    damaged = run.logged("train/damaged")
    if damaged.size:
        found.append(("training samples replaced", f"{damaged[-1]:,.0f}"))
    found.append(("rows logged", f"{run.num_rows:,}"))
    return found


def settings_rows(run: RunRecord) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return (section, [(key, value, default if it differs)])."""
    defaults = flat(Settings().model_dump(mode="json"))
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for key, value in run.settings.items():
        section, _, name = key.rpartition(".")
        differs = key in defaults and defaults[key] != value
        sections.setdefault(section, []).append((name, _plain(value), _plain(defaults[key]) if differs else ""))
    return sorted(sections.items(), key=lambda item: item[0])


def different_settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return (key, value of each run) of the settings that differ, without the output folder."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [(key, [_plain(run.settings.get(key, "–")) for run in runs]) for key in keys if key != "run.out"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def lineage(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return (what, hash or name, note)."""
    rows = []
    if run.card:
        hashes = run.card.hashes
        now = run.manifest.sha256 if run.manifest else ""
        same = "the same set is there now" if now == hashes.manifest else "ANOTHER set is there now"
        rows.append(("shard set", hashes.manifest, same if now else ""))
        rows.append(("settings", hashes.settings, ""))
        rows.append(("code", hashes.code, "with uncommitted changes" if hashes.code.endswith("+") else ""))
        averaged = f", {run.card.averaged}" if str(run.card.averaged) else ""
        known = f"step {run.card.trained.step:,}{averaged}, model/{run.card.weights_name}"
        rows.append(("weights", hashes.weights, known))
        if hashes.teacher:
            rows.append(("teacher", hashes.teacher, f"weights of {run.settings.get('train.teacher', 'a model')}"))
    elif "commit" in run.environment:
        rows.append(("code", str(run.environment["commit"]), ""))
    return rows


def environment_rows(run: RunRecord) -> list[tuple[str, str]]:
    return [
        (key.removeprefix("packages."), " ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in flat(run.environment).items()
        if key != "commit"
    ]


def left_out(run: RunRecord) -> tuple[list[tuple[str, int]], list[tuple[str, str, str]], int]:
    """Return ([(reason, images)], [(source, reason, detail)] of the first few, number of the other images)."""
    if run.manifest is None:
        return [], [], 0
    counts = Counter(one.reason.replace("_", " ") for one in run.manifest.left_out)
    named = [(one.source, one.reason.replace("_", " "), one.detail) for one in run.manifest.left_out[:_LEFT_OUT_NAMED]]
    return counts.most_common(), named, len(run.manifest.left_out) - len(named)


def _clock(time_s: float) -> str:
    return "–" if time_s != time_s else time.strftime("%F %T UTC", time.gmtime(time_s))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(_plain(one) for one in value) if isinstance(value, list) else str(value)
