"""Decisions of a model on a split: thresholds chosen on one split, and what they do on another.

`wasteddp evaluate RUN --bins FILE --max-error E` writes, next to the evaluation of the split:

    decisions.json    figures of each bin, where 1,000 items go, and whether the promises held
    policy.json       the bins and thresholds, for `wasteddp predict MODEL IMAGES --policy FILE`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

from wasteddp.decisions.decide import PERSON, REASONS, Policy
from wasteddp.decisions.intervals import SampleGroups, share_interval, wilson_interval
from wasteddp.decisions.sorting import measure_bins, per_thousand
from wasteddp.decisions.thresholds import in_words, is_promised, no_promise, outcome, risk_coverage
from wasteddp.errors import inert
from wasteddp.files import read_regular, write_atomically
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.evaluation_files import Evaluation, ReliabilityRecord, plain
from wasteddp.inference.metrics import Answers, Reliability, percent
from wasteddp.inference.policy_files import ChosenPolicy, made_for, save_policy

RECORD_FORMAT = "wasteddp-decisions"
RECORD_VERSION = 1
_SHARES = ("purity", "recovery")
_CURVE = 101  # points of the risk-coverage curve that are written


def measure_policy(
    policy: Policy,
    labels: npt.ArrayLike,
    probabilities_NK: npt.ArrayLike,
    *,
    split: str,
    groups: SampleGroups | None = None,
) -> dict[str, Any]:
    """Return what the policy does on a split, as plain values. Shares are in 0..1, or None where nothing is counted.

    Args:
        labels: true classes, int [N].
        probabilities_NK: calibrated.
        groups: of the samples, for intervals over groups.
    """
    rules, truth = policy.rules, np.asarray(labels, np.int64)
    groups_N = groups.to_resample if groups else None
    found = policy.decide(probabilities_NK)
    person = len(rules.bins)
    own = np.asarray(rules.bin_of)[truth]
    flagged = found.reasons == REASONS.index("hazard")
    alone = (found.assigned < person) & ~flagged
    wrong = found.assigned != own
    best = Policy(replace(rules, person=None)).decide(probabilities_NK)
    answers = Answers(
        np.arange(len(truth)), own, best.assigned, best.confidence.astype(np.float32), np.zeros(len(truth), np.float32)
    )
    coverage, error, area = risk_coverage(best.confidence, best.assigned == own)
    shown = np.unique(np.linspace(0, len(truth) - 1, min(_CURVE, len(truth))).astype(int))
    hazards = {}
    reached_NH = policy.reach_hazards(probabilities_NK)
    for (name, threshold), reached in zip(policy.hazards.items(), reached_NH.T, strict=True):
        number = rules.classes.index(name)
        is_it, other = truth == number, own != rules.bin_of[number]
        found_it = reached | (found.assigned == rules.bin_of[number])
        hazards[name] = {
            "floor": threshold.recall,
            "confidence": threshold.confidence,
            "images": int(is_it.sum()),
            "recall": _share(found_it & is_it, is_it),
            "recall_interval": _interval(found_it, is_it, groups_N),
            "false_alarms": int((reached & other).sum()),  # a second hazard of the same bin is not one
            "share_of_false_alarms": _share(reached & other, other),
        }
    return {
        "split": split,
        "items": len(truth),
        "groups": groups.to_json() if groups else None,
        "decided_alone": _share(alone, np.ones(len(truth), bool)),
        "error_alone": _share(alone & wrong, alone),
        "error_alone_interval": _interval(wrong, alone, groups_N),
        "promised_error": policy.error.max_error if policy.error else None,
        "to_a_person": {
            reason: int(((found.assigned == person) & (found.reasons == number)).sum())
            for number, reason in enumerate(REASONS)
            if reason
        },
        "hazard_decisions": int((flagged & (found.assigned < person)).sum()),
        "area_under_risk_coverage": area,
        "risk_coverage": [[float(coverage[row]), float(error[row])] for row in shown],
        "reliability": Reliability.measure(answers).to_json(),
        "bins": [one.to_json() for one in measure_bins(truth, found.assigned, rules, groups=groups_N)],
        "bins_by_mass": [
            one.to_json() for one in measure_bins(truth, found.assigned, rules, by_mass=True, groups=groups_N)
        ]
        if rules.grams
        else None,
        "per_thousand": per_thousand(truth, found.assigned, rules),
        "hazards": hazards,
    }


def decisions_record(
    policy: Policy,
    labels: npt.ArrayLike,
    probabilities_NK: npt.ArrayLike,
    *,
    model: Mapping[str, Any],
    split: str,
    chosen_on: str,
    groups: SampleGroups | None,
    chosen_groups: Mapping[str, Any] | None,
    selected: bool = True,
) -> dict[str, Any]:
    """Return the content of decisions.json.

    Args:
        model: what the probabilities depend on.
        groups: of these samples.
        chosen_groups: `dependent_groups` of the samples that the thresholds were chosen on.
        selected: the best checkpoint was selected on the split that the thresholds were chosen on.
    """
    return {
        "format": RECORD_FORMAT,
        "format_version": RECORD_VERSION,
        "model": dict(model),
        "policy": policy.to_json(),
        "chosen_on": chosen_on,
        "chosen_groups": dict(chosen_groups) if chosen_groups else None,
        "selected": selected,
        **measure_policy(policy, labels, probabilities_NK, split=split, groups=groups),
    }


def dependent_groups(groups: SampleGroups | None) -> dict[str, Any] | None:
    """Return `groups` as plain values; None if no sample depends on another one."""
    return groups.to_json() if groups and groups.num_groups < len(groups.numbers_N) else None


def report_policy(
    folder: Path,
    chosen: ChosenPolicy,
    evaluation: Evaluation,
    card: BundleCard,
    console: Console,
    *,
    tta: str,
    set_sha256: str,
    selected: bool,
) -> None:
    """Write decisions.json and policy.json, and print the main figures. See `decisions_record`.

    Args:
        set_sha256: of the manifest of the set that was evaluated.
    """
    policy = chosen.policy
    record = decisions_record(
        policy,
        evaluation.labels,
        evaluation.probabilities_NK,
        model=made_for(card, tta),
        split=evaluation.seen.split,
        chosen_on=chosen.chosen_on_in(set_sha256),
        groups=evaluation.groups,
        chosen_groups=chosen.chosen_groups,
        selected=selected,
    )
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    save_policy(folder / "policy.json", chosen, card, tta=tta)
    write_atomically(folder / "decisions.json", text.encode("utf-8", "backslashreplace"))
    console.print(_table(record["bins"], title=f"bins of {plain(policy.rules.name or 'the shard set')}"))
    for line in _lines(record):
        console.print(inert(line), markup=False, highlight=False, soft_wrap=True)


def _table(bins: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("bin", "items", "purity", "recovery", "contamination"):
        table.add_column(column, justify="left" if column in ("bin", "contamination") else "right")
    for one in bins:
        foreign = ", ".join(f"{plain(part['class'])} {percent(part['share'])}" for part in one["contamination"][:3])
        table.add_row(plain(one["bin"]), f"{one['items']:,}", *(_cell(one[name]) for name in _SHARES), foreign)
    return table


def _cell(values: Sequence[float | None]) -> str:
    """(0.9, 0.8, 0.95) -> 90.0 % (80.0 to 95.0)"""
    value, low, high = values
    if value is None:
        return "-"
    return percent(value) + ("" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f})")


def _lines(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "of 1,000 items like these: "
        + ", ".join(
            f"{row['items']:.0f} to {row['bin']}" + (f" ({row['wrong']:.0f} wrong)" if row["bin"] != PERSON else "")
            for row in record["per_thousand"]
        )
    ]
    promised = is_promised(record)
    word = "promise" if promised else "aim"
    if record["promised_error"] is not None and record["error_alone"] is not None:
        limit, ends = record["promised_error"], record["error_alone_interval"]
        found = in_words(outcome(record["error_alone"], limit, ends, at_most=True), promised=promised)
        interval = f" ({percent(ends[0])} to {percent(ends[1])})" if ends else ""
        lines.append(
            f"decided alone: {percent(record['decided_alone'])} of the items, {percent(record['error_alone'])} of them "
            f"wrong{interval}; the {word} of {percent(limit)}, chosen on {record['chosen_on']}, {found}"
        )
    elif record["promised_error"] is not None:
        lines.append(
            f"decided alone: none of the items; the {word} of {percent(record['promised_error'])}, chosen on "
            f"{record['chosen_on']}, says nothing here"
        )
    for name, one in record["hazards"].items():
        alarms = f"{one['false_alarms']} false alarm{'s' * (one['false_alarms'] != 1)}"
        if one["recall"] is None:
            lines.append(f"hazard {name}: no image of it here, floor {percent(one['floor'])}; {alarms}")
            continue
        ends = one["recall_interval"]
        found = in_words(outcome(one["recall"], one["floor"], ends, at_most=False), promised=promised)
        interval = f" ({percent(ends[0])} to {percent(ends[1])})" if ends else ""
        lines.append(
            f"hazard {name}: recall {percent(one['recall'])}{interval} of {one['images']} images; the {word} of "
            f"{percent(one['floor'])} {found}; {alarms}"
        )
    if line := no_promise(record):
        lines.append(line)
    return lines


def _share(part: Any, whole: Any) -> float | None:
    return float(part.sum() / whole.sum()) if whole.sum() else None


def _interval(part: Any, whole: Any, groups_N: npt.NDArray[np.int32] | None) -> list[float] | None:
    """Return the 95 % interval of part / whole, over groups if given (Wilson's otherwise); None if it is not known."""
    if not whole.any() or (groups_N is not None and len(np.unique(groups_N[whole])) < 2):
        return None
    if groups_N is None:
        return list(wilson_interval(int((part & whole).sum()), int(whole.sum())))
    return list(share_interval(part[whole], groups_N[whole]))


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


Number = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Ends = Annotated[list[Number], Field(min_length=2, max_length=2)]
Three = Annotated[list[Number | None], Field(min_length=3, max_length=3)]  # value, and its interval


class _Foreign(_Model):
    class_name: str = Field(alias="class")
    share: Number


class _Bin(_Model):
    bin: str
    items: Count
    belonging: Count
    purity: Three
    recovery: Three
    contamination: list[_Foreign]


class _Thousand(_Model):
    bin: str
    items: Annotated[float, Field(ge=0, le=1000.001)]
    wrong: Annotated[float, Field(ge=0, le=1000.001)] | None


class _Hazard(_Model):
    floor: Number
    confidence: Number
    images: Count
    recall: Number | None
    recall_interval: Ends | None
    false_alarms: Count
    share_of_false_alarms: Number | None


class _Error(_Model):
    threshold: Number
    max_error: Number
    confidence: Number
    bound: Number
    num_samples: Count
    num_decided: Count
    num_wrong: Count


class _Recall(_Model):
    threshold: Number
    num_hazards: Count
    num_missed: Count


class _Policy(_Model):
    name: str
    error: _Error | None
    hazards: dict[str, _Recall]
    person: float | None


class _ModelOf(_Model):
    weights: str
    temperature: float
    tta: str


class _People(_Model):
    hazard: Count = 0
    cost: Count
    doubt: Count


class _Groups(_Model):
    rule: str
    num_groups: Count


class _Decisions(_Model):
    """The part of decisions.json that the report shows."""

    model: _ModelOf
    policy: _Policy
    chosen_on: str
    split: str
    items: Annotated[int, Field(ge=1, lt=2**53)]
    groups: _Groups | None
    chosen_groups: _Groups | None = None
    selected: bool = True
    decided_alone: Number
    error_alone: Number | None
    error_alone_interval: Ends | None
    promised_error: Number | None
    to_a_person: _People
    hazard_decisions: Count
    area_under_risk_coverage: Number
    risk_coverage: list[Ends] = Field(min_length=1, max_length=_CURVE)
    reliability: ReliabilityRecord
    bins: list[_Bin] = Field(min_length=1)
    bins_by_mass: list[_Bin] | None
    per_thousand: list[_Thousand] = Field(min_length=1)
    hazards: dict[str, _Hazard]

    @model_validator(mode="after")
    def _fits(self) -> _Decisions:
        if (self.promised_error is None) != (self.policy.error is None):
            raise ValueError("its promise is not that of its policy")
        if self.hazards.keys() != self.policy.hazards.keys():
            raise ValueError("its hazards are not those of its policy")
        return self


def read_decisions(path: Path) -> dict[str, Any]:
    """Return the content of a decisions.json after a check of all that the report uses.

    Raises:
        ValueError: it is not a record of decisions in this format.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(read_regular(path))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    known = (RECORD_FORMAT, RECORD_VERSION)
    if not isinstance(record, dict) or (record.get("format"), record.get("format_version")) != known:
        raise ValueError("another version wrote it: evaluate again")
    try:
        _Decisions.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return record
