"""Decisions of a model on a split: thresholds chosen on one split, and what they do on another.

`wasteddp evaluate RUN --bins FILE --max-error E` writes, next to the evaluation of the split:

    decisions.json    figures of each bin, where 1,000 items go, and whether the promises held
    policy.json       the bins and thresholds, for `wasteddp predict MODEL IMAGES --policy FILE`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wasteddp.decisions.bins import PERSON
from wasteddp.decisions.decide import REASONS, Policy
from wasteddp.decisions.sorting import measure_bins, per_thousand
from wasteddp.decisions.thresholds import risk_coverage
from wasteddp.errors import DecisionError
from wasteddp.files import read_regular, write_atomically
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.metrics import percent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from wasteddp.inference.evaluation_files import Evaluation

FORMAT = "wasteddp-policy"
FORMAT_VERSION = 1


def save_policy(path: Path, policy: Policy, card: BundleCard, *, tta: str, chosen_on: str) -> None:
    """Write the bins and thresholds, with what they belong to: the weights, the temperature and the views."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": _made_for(card, tta),
        "chosen_on": chosen_on,
        **policy.to_json(),
    }
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def load_policy(path: Path, card: BundleCard, *, tta: str) -> Policy:
    """Read a policy of this model with these views.

    Raises:
        DecisionError: the file is not a policy, or another model's.
    """
    try:
        raw = json.loads(read_regular(path))
        if raw["format"] != FORMAT or raw["format_version"] != FORMAT_VERSION:
            raise ValueError("its format is another one")
        made_for, policy = dict(raw["model"]), Policy.from_json(raw)
        policy.decide(np.full((1, len(policy.rules.classes)), 0.0))  # its thresholds are numbers, or a TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as failure:
        raise DecisionError(
            f"{path} is not a policy of wasteddp: {failure}",
            "items would go into wrong bins, or nowhere",
            "write it with: wasteddp evaluate RUN --bins FILE",
        ) from failure
    now = _made_for(card, tta)
    if made_for != now or policy.rules.classes != card.classes:
        others = {name: value for name, value in now.items() if made_for.get(name) != value}
        differs = [f"{name} {made_for.get(name)!r} instead of {value!r}" for name, value in others.items()]
        raise DecisionError(
            f"{path} was made for another model: {', '.join(differs) or 'other classes'}",
            "its thresholds promise nothing for these probabilities",
            "write it again with: wasteddp evaluate RUN --bins FILE, and the same --tta as here",
        )
    return policy


def _made_for(card: BundleCard, tta: str) -> dict[str, Any]:
    """Return all that changes the probabilities which the thresholds were chosen on."""
    return {"weights": card.hashes.weights, "temperature": card.temperature, "tta": tta}


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
    folder: Path,
    policy: Policy,
    evaluation: Evaluation,
    card: BundleCard,
    console: Console,
    *,
    tta: str,
    chosen_on: str,
) -> None:
    """Write decisions.json and policy.json, and print the main figures."""
    record = {"policy": policy.to_json(), "chosen_on": chosen_on, **measure_policy(policy, evaluation)}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / "decisions.json", text.encode())
    save_policy(folder / "policy.json", policy, card, tta=tta, chosen_on=chosen_on)
    console.print(_table(record["bins"], title=f"bins of {policy.rules.name or 'the shard set'}"))
    for line in _lines(record):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(bins: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("bin", "items", "purity", "recovery", "contamination"):
        table.add_column(column, justify="left" if column in ("bin", "contamination") else "right")
    for one in bins:
        foreign = ", ".join(f"{part['class']} {percent(part['share'])}" for part in one["contamination"][:3])
        shares = ["-" if one[name][0] is None else percent(one[name][0]) for name in ("purity", "recovery")]
        table.add_row(one["bin"], f"{one['items']:,}", *shares, foreign)
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
