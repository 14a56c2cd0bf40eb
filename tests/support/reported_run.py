"""A small run with everything that a report shows, and functions that read the figures of a page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
from small_run import write_run

from wasteddp.cli import main
from wasteddp.decisions.decide import BinRules, Hazard, choose_policy
from wasteddp.decisions.intervals import SampleGroups
from wasteddp.inference.bundle import read_card
from wasteddp.inference.sorting import decisions_record, dependent_groups

STEPS_PER_EPOCH = 20


def metric_rows(num_rows: int) -> Iterable[dict[str, float]]:
    """Yield rows like those of a training: a noisy loss, an evaluation every 20 steps, a second start in the middle."""
    for step in range(1, num_rows + 1):
        row = {
            "step": step,
            "time_s": 1.8e9 + step * 0.5 + (900 if step > num_rows // 2 else 0),
            "epoch": step / STEPS_PER_EPOCH,
            "lr": 0.05 * (1 - step / num_rows),
            "train/loss": 1.7 * math.exp(-2 * step / num_rows) + 0.2 * math.sin(step * 1.7),
            "train/grad_norm": 2 + math.sin(step),
            "train/images_per_s": 400 + 30 * math.sin(step / 3),
            "train/step_ms": 80 - 5 * math.sin(step / 3),
            "train/wait_fraction": 0.01 + 0.005 * math.cos(step),
            "train/starved_fraction": 0.02,
            "train/damaged": 0,
            "checkpoint/stall_ms": 12.5,
            "checkpoint/seconds": 0.5 + step / num_rows,
            "attempt": 1 + (step > num_rows // 2),
        }
        if step % STEPS_PER_EPOCH == 0:
            share = step / num_rows
            row |= {"val/loss": 1.6 - share, "val/accuracy": 0.3 + share / 2, "val/macro_recall": 0.25 + share / 2}
            row |= {"val/macro_f1": 0.2 + share / 2, "val/samples": 10, "val/seconds": 0.4, "best/value": 0.8}
        yield row


def write_metrics(run: Path, rows: Iterable[dict[str, float]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_reported_run(folder: Path, num_rows: int = 100) -> Path:
    """Write `folder/run`: a model, 100 rows, and an evaluation of 10 images with some mistakes."""
    run = write_run(folder)
    write_metrics(run, metric_rows(num_rows))
    (run / "environment.json").write_text(json.dumps({"commit": "abc", "cores": 2, "packages": {"torch": "2.14.1"}}))
    assert main(["evaluate", str(run)]) == 0
    return run


def sorted_items(seed: int, count: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return labels [N] that are drawn from probabilities [N, K], and the probabilities."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(classes) * 0.05, count)
    return (shares.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1), shares


def write_decisions(run: Path, *, groups: int = 0, **change: Any) -> dict[str, Any]:
    """Write RUN/evaluations/test/decisions.json of 3,000 items, with a hazard and a promise; return its content."""
    card = read_card(run / "model")
    rules = BinRules(
        "Example city", card.classes, ("round bin", "flat bin"), (0, 1, 1), (10.0, 20.0, 30.0),
        (Hazard(card.classes[2], 0.9, 0.9),), person=0.5,
    )  # fmt: skip
    policy = choose_policy(rules, *sorted_items(0, 1000), max_error=0.05)
    labels, shares = sorted_items(1, 3000)
    numbers = np.arange(3000, dtype=np.int32) % groups if groups else None
    record = decisions_record(
        policy,
        labels,
        shares,
        model={"weights": card.hashes.weights, "temperature": card.temperature, "tta": "none"},
        split="test",
        chosen_on="val",
        groups=None if numbers is None else SampleGroups("column site", numbers),
        chosen_groups=None if numbers is None else dependent_groups(SampleGroups("column site", numbers)),
    )
    (run / "evaluations" / "test" / "decisions.json").write_text(json.dumps(record | change))
    return record


def charts_of(page: str) -> dict[str, dict[str, Any]]:
    """Return the data of each chart, by its title."""
    charts = {}
    for figure in page.split("<figure")[1:]:
        data = re.search(r'<script type="application/json">(.*?)</script>', figure, re.DOTALL)
        title = re.search(r"<figcaption>(.*?)(?: <span|</figcaption>)", figure)
        if data and title:
            charts[unescape(title[1])] = json.loads(data[1])
    return charts
