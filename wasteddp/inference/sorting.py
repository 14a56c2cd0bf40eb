"""Decisions of a model on a split: thresholds chosen on one split, and what they do on another.

`wasteddp evaluate RUN --bins FILE --max-error E` writes, next to the evaluation of the split:

    decisions.json    figures of each bin, where 1,000 items go, and whether the promises held
    policy.json       the bins and thresholds, for `wasteddp predict MODEL IMAGES --policy FILE`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from wasteddp.decisions.bins import PERSON, BinRules
from wasteddp.decisions.decide import REASONS, Policy
from wasteddp.decisions.sorting import BinFigures, measure_bins, per_thousand
from wasteddp.decisions.thresholds import ErrorThreshold, RecallThreshold, risk_coverage
from wasteddp.errors import DecisionError
from wasteddp.files import read_regular, write_atomically
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.evaluation_files import Evaluation
from wasteddp.inference.metrics import percent

FORMAT = "wasteddp-policy"
FORMAT_VERSION = 1


def save_policy(path: Path, policy: Policy, card: BundleCard, *, chosen_on: str) -> None:
    """Write the bins and thresholds, with the hash of the weights and the temperature that they belong to."""
    rules = policy.rules
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "weights": card.hashes.weights,
        "temperature": card.temperature,
        "chosen_on": chosen_on,
        "name": rules.name,
        "sha256": rules.sha256,
        "classes": list(rules.classes),
        "bins": [rules.bins[number] for number in rules.bin_of],
        "costs": None if rules.costs_KB is None else rules.costs_KB.tolist(),
        "person": rules.person,
        "error": asdict(policy.error) if policy.error else None,
        "hazards": {name: asdict(one) for name, one in policy.hazards.items()},
    }
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def load_policy(path: Path, card: BundleCard) -> Policy:
    """Read a policy of this model.

    Raises:
        DecisionError: the file is not a policy, or another model's.
    """
    try:
        raw = json.loads(read_regular(path))
        if raw["format"] != FORMAT or raw["format_version"] != FORMAT_VERSION:
            raise ValueError("its format is another one")
        same = raw["weights"] == card.hashes.weights and raw["temperature"] == card.temperature
        classes, of = tuple(map(str, raw["classes"])), [str(name) for name in raw["bins"]]
        bins = tuple(dict.fromkeys(of))
        costs_KB = None if raw["costs"] is None else np.array(raw["costs"], np.float64)
        if len(of) != len(classes) or (costs_KB is not None and costs_KB.shape != (len(classes), len(bins))):
            raise ValueError("its tables do not have the size of its classes")
        rules = BinRules(
            name=str(raw["name"]),
            classes=classes,
            bins=bins,
            bin_of=tuple(bins.index(name) for name in of),
            costs_KB=costs_KB,
            person=None if raw["person"] is None else float(raw["person"]),
            sha256=str(raw["sha256"]),
        )
        error = ErrorThreshold(**raw["error"]) if raw["error"] else None
        hazards = {classes[classes.index(name)]: RecallThreshold(**one) for name, one in raw["hazards"].items()}
        policy = Policy(rules, error, hazards)
        policy.decide(np.full((1, len(classes)), 1 / len(classes)))  # numbers, or a TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as failure:
        raise DecisionError(
            f"{path} is not a policy of wasteddp: {failure}",
            "items would go into wrong bins, or nowhere",
            "write it with: wasteddp evaluate RUN --bins FILE",
        ) from failure
    if not same or classes != card.classes:
        raise DecisionError(
            f"{path} was made for another model or another calibration of it",
            "its thresholds promise nothing for this model",
            "write it again with: wasteddp evaluate RUN --bins FILE",
        )
    return policy


def measure_policy(policy: Policy, evaluation: Evaluation) -> dict[str, Any]:
    """Return what the policy does on a split, as plain values. Shares are in 0..1, or None where nothing is counted."""
    rules, labels = policy.rules, np.asarray(evaluation.labels, np.int64)
    found = policy.decide(evaluation.probabilities_NK)
    person = len(rules.bins)
    own = np.asarray(rules.bin_of)[labels]
    alone = (found.assigned < person) & (found.reasons != REASONS.index("hazard"))
    wrong = found.assigned != own
    plain = Policy(rules).decide(evaluation.probabilities_NK)
    _, _, area = risk_coverage(plain.confidence, plain.assigned == own)
    hazards = {}
    for name, threshold in policy.hazards.items():
        is_it = labels == rules.classes.index(name)
        into = found.assigned == rules.bin_of[rules.classes.index(name)]
        flagged = found.reasons == REASONS.index("hazard")
        hazards[name] = {
            "floor": threshold.recall,
            "confidence": threshold.confidence,
            "images": int(is_it.sum()),
            "recall": _share(into & is_it, is_it),
            "false_alarms": int((flagged & into & ~is_it).sum()),
            "share_of_false_alarms": _share(flagged & into & ~is_it, ~is_it),
        }
    return {
        "split": evaluation.seen.split,
        "items": len(labels),
        "decided_alone": _share(alone, np.ones(len(labels), bool)),
        "error_alone": _share(alone & wrong, alone),
        "promised_error": policy.error.max_error if policy.error else None,
        "to_a_person": {
            reason: int(((found.assigned == person) & (found.reasons == number)).sum())
            for number, reason in enumerate(REASONS)
            if reason in ("cost", "doubt")
        },
        "area_under_risk_coverage": area,
        "bins": [one.to_json() for one in measure_bins(labels, found.assigned, rules)],
        "bins_by_mass": [one.to_json() for one in measure_bins(labels, found.assigned, rules, by_mass=True)]
        if rules.grams
        else None,
        "per_thousand": per_thousand(labels, found.assigned, rules),
        "hazards": hazards,
    }


def report_policy(
    folder: Path, policy: Policy, evaluation: Evaluation, card: BundleCard, console: Console, *, chosen_on: str
) -> None:
    """Write decisions.json and policy.json, and print the main figures."""
    record = {"rules": policy.to_json(), "chosen_on": chosen_on, **measure_policy(policy, evaluation)}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / "decisions.json", text.encode())
    save_policy(folder / "policy.json", policy, card, chosen_on=chosen_on)
    labels = np.asarray(evaluation.labels, np.int64)
    figures = measure_bins(labels, policy.decide(evaluation.probabilities_NK).assigned, policy.rules)
    console.print(_table(figures, title=f"bins of {policy.rules.name or 'the shard set'}"))
    for line in _lines(record):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(figures: tuple[BinFigures, ...], *, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("bin", "items", "purity", "recovery", "contamination"):
        table.add_column(column, justify="left" if column in ("bin", "contamination") else "right")
    for one in figures:
        foreign = ", ".join(f"{name} {percent(share)}" for name, share in one.contamination[:3])
        table.add_row(one.name, f"{one.num_items:,}", percent(one.purity[0]), percent(one.recovery[0]), foreign)
    return table


def _lines(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "of 1,000 items like these: "
        + ", ".join(
            f"{row['items']:.0f} to {row['bin']}" + (f" ({row['wrong']:.0f} wrong)" if row["bin"] != PERSON else "")
            for row in record["per_thousand"]
        )
    ]
    if record["promised_error"] is not None and record["error_alone"] is not None:
        held = "held" if record["error_alone"] <= record["promised_error"] else "was not held"
        lines.append(
            f"decided alone: {percent(record['decided_alone'])} of the items, {percent(record['error_alone'])} of them "
            f"wrong; the promise of {percent(record['promised_error'])}, chosen on {record['chosen_on']}, {held} here"
        )
    for name, one in record["hazards"].items():
        recall = "no image of it here" if one["recall"] is None else f"recall {percent(one['recall'])}"
        lines.append(
            f"hazard {name}: {recall} of {one['images']} images, floor {percent(one['floor'])}; "
            f"{one['false_alarms']} false alarms"
        )
    return lines


def _share(part: Any, whole: Any) -> float | None:
    return float(part.sum() / whole.sum()) if whole.sum() else None
