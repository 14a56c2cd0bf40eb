"""Decisions on the page: sentences for a reader in a hurry, then bins, promises, hazards, and the curve of doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wasteddp.decisions.bin_files import load_bins
from wasteddp.decisions.decide import Policy, choose_policy
from wasteddp.decisions.intervals import SampleGroups, describe_groups
from wasteddp.decisions.thresholds import in_words, is_promised, no_promise, outcome
from wasteddp.errors import RunError
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.metrics import percent
from wasteddp.inference.prediction_files import SavedPredictions, read_predictions
from wasteddp.inference.sorting import decisions_record, dependent_groups
from wasteddp.report.charts import Mark, scale_marks, scaled_path
from wasteddp.report.evaluations import Share, reliability_bars
from wasteddp.report.run_record import RunRecord, ticks

_FOREIGN_NAMED = 3  # classes that contaminate a bin


@dataclass(frozen=True, slots=True)
class BinRow:
    name: str
    items: int
    purity: Share
    recovery: Share
    contamination: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part of 1,000 items, in the bar that has all of them."""

    kind: str  # a class of the page's style
    name: str
    items: int


@dataclass(frozen=True, slots=True)
class Curve:
    """The error of the items that are decided alone, by their share. Positions are in 0..1000 of the plot."""

    path: str
    x_marks: tuple[Mark, ...]
    y_marks: tuple[Mark, ...]
    point: tuple[float, float] | None  # the policy's
    promised: float | None


def decisions_context(one: RunRecord, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables for the decisions on one split."""
    model = record["model"]
    is_other = one.card is not None and model["weights"] != one.card.hashes.weights
    parts = _parts(record)
    return {
        "record": record,
        "name": record["policy"]["name"] or "the bins of the shard set",
        "stale": is_other,
        "calibrated_since": not is_other and one.card is not None and model["temperature"] != one.card.temperature,
        "optimistic": record["split"] == record["chosen_on"] and bool(record["policy"]["error"] or record["hazards"]),
        "sentences": [sentence.replace(" %", "\u00a0%") for sentence in sentences(record, one.card)],
        "missed": [sentence.replace(" %", "\u00a0%") for sentence in missed(record)],
        "parts": parts,
        "bins": [_bin_row(row) for row in record["bins"]],
        "bins_by_mass": [_bin_row(row) for row in record["bins_by_mass"] or ()],
        "where": [
            (row["bin"], f"{row['items']:,.0f}", "" if row["wrong"] is None else f"{row['wrong']:,.0f}")
            for row in record["per_thousand"]
        ],
        "promises": _promises(record),
        "promised": is_promised(record),
        "selected": record.get("selected", True) and bool(record["policy"]["error"] or record["hazards"]),
        "curve": _curve(record),
        "bars": reliability_bars(record["reliability"]),
        "threshold": record["policy"]["error"]["threshold"] if record["policy"]["error"] else None,
        "intervals": describe_groups(record["groups"]),
    }


def calibration_rows(card: BundleCard | None) -> list[tuple[str, str, str]]:
    """Return (what, before, after) of a model's calibration; [] if it is not calibrated."""
    if card is None or not card.calibration:
        return []
    found = card.calibration
    return [
        ("expected calibration error", _points(found["ece_before"]), _points(found["ece_after"])),
        ("mean negative log-likelihood, nats", f"{found['nll_before']:.3f}", f"{found['nll_after']:.3f}"),
        ("temperature", "1", f"{found['temperature']:.3f}"),
    ]


def calibration_sentence(card: BundleCard | None) -> str:
    """Return how far the probabilities can be trusted."""
    if card is None:
        return ""
    if not card.calibration:
        return "The probabilities are not calibrated: the model may be surer than it is right."
    found = card.calibration
    value, low, high = found["ece_after"]
    return (
        f"The model's confidence differs from its accuracy by {100 * value:.1f} points on average (95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f}), on the {found['num_samples']:,} images of {found['split']} that it was "
        f"calibrated on; before calibration, by {_points(found['ece_before'])}."
    )


def sentences(record: Mapping[str, Any], card: BundleCard | None) -> list[str]:
    """Return what a plant manager needs, in plain sentences."""
    counts = {part.kind: part.items for part in _parts(record)}
    alone = counts["right"] + counts["wrong"]
    first = f"Of 1,000 items like these, the model sorts {alone:,} alone"
    first += f", sends {counts['hazard']:,} to the bin of a hazard" if counts["hazard"] else ""
    found = [f"{first} and passes {counts['person']:,} to a person."]
    promised = is_promised(record)
    to_a_person = (
        " or, since they may be another hazard too, to a person" if record["to_a_person"].get("hazard") else ""
    )
    for name, one in record["hazards"].items():
        price, limit = one["share_of_false_alarms"], _short(one["floor"])
        if one["recall"] is None:
            seen = "there is no image of it here"
        else:
            ends = one["recall_interval"]
            interval = f" (95 % interval {_range(ends)})" if ends else ""
            seen = f"{percent(one['recall'])} of its {one['images']:,} images{interval} go into its bin{to_a_person}"
        if promised:
            seen += f". At least {limit} was promised, with {_short(one['confidence'])} confidence"
        else:
            seen += f". The aim was at least {limit}"
        if one["recall"] is not None:
            kept = outcome(one["recall"], one["floor"], one["recall_interval"], at_most=False)
            seen += f": {'the promise' if promised else 'it'} {in_words(kept, promised=promised)}"
        found_items = f"{one['false_alarms']:,} other item{'s' * (one['false_alarms'] != 1)}"
        share = f" ({percent(price)} of all other items)" if price is not None else ""
        found_too = "is taken for it" if one["false_alarms"] == 1 else "are taken for it"
        found.append(f"Hazard {name}: {seen}. The price is false alarms: {found_items}{share} {found_too}.")
    if record["error_alone"] is not None:
        ends = record["error_alone_interval"]
        interval = f" (95 % interval {_range(ends)})" if ends else ""
        found.append(
            f"Of those that it sorts alone, {percent(record['error_alone'])} go into a wrong bin{interval}. "
            + _verdict(record)
        )
    if purity := _purity_sentence(record["bins"]):
        found.append(purity)
    if sentence := calibration_sentence(card):
        found.append(sentence)
    if line := no_promise(record):
        found.append(f"{line[:1].upper()}{line[1:]}.")
    found.append("Images of single items are not a sample of a plant's belt: purity here is not the purity of a bale.")
    return found


def missed(record: Mapping[str, Any]) -> list[str]:
    """Return what was promised or aimed at and not kept here, in spite of chance; hazards first."""
    error, found = record["policy"]["error"], list[str]()
    for name, one in record["hazards"].items():
        value, limit, ends = one["recall"], one["floor"], one["recall_interval"]
        if value is not None and outcome(value, limit, ends, at_most=False) == "broken":
            found.append(
                f"Only {percent(value)} of the hazard {name} was found; the floor is {_short(limit)}. Do not rely on "
                "these decisions for it."
            )
    value, ends = record["error_alone"], record["error_alone_interval"]
    if error and value is not None and outcome(value, error["max_error"], ends, at_most=True) == "broken":
        found.append(
            f"{percent(value)} of what the model sorts alone goes into a wrong bin; the limit is "
            f"{_short(error['max_error'])}. Choose the thresholds again on images like these."
        )
    return found


def decide_again(
    one: RunRecord, bins: Path, *, max_error: float | None, level: float, choose_on: str = ""
) -> RunRecord:
    """Return the run with the decisions of other bins, from the predictions that `wasteddp evaluate` saved.

    Args:
        max_error, level: see `decide.choose_policy`.
        choose_on: split to choose the thresholds on; "": data.eval_split of the run.

    Raises:
        RunError: there are no predictions of the run's model, or those to choose a threshold on are missing.
        DecisionError: the file of bins is wrong, or there are too few images for a guarantee.
    """
    card = one.card
    if card is None:
        raise RunError(f"{one.folder} has no model", "the classes to sort are not known", "name a run with a model")
    rules = load_bins(bins, card.classes)
    saved: dict[str, tuple[SavedPredictions, Mapping[str, Any]]] = {}
    notes = []
    for record in one.evaluations:
        split, path = record["options"]["split"], one.folder / "evaluations" / record["options"]["split"]
        if (record["hashes"]["weights"], record["model"]["temperature"]) != (card.hashes.weights, card.temperature):
            notes.append(f"{path} is of an earlier model or calibration, so {bins} was not applied to it")
        elif not (path / "predictions.csv").is_file():
            notes.append(f"{path} has no predictions.csv, so {bins} was not applied to it")
        else:
            saved[split] = read_predictions(path / "predictions.csv", card.classes), record
    chosen_on = choose_on or str(one.settings.get("data.eval_split", "val"))
    chooses = bool(rules.hazards) or max_error is not None
    if not saved or (chooses and chosen_on not in saved):
        raise RunError(
            f"{one.folder}/evaluations has no predictions of the run's present model and calibration"
            + (f" on {chosen_on}, where thresholds are chosen" if saved or choose_on else ""),
            f"{bins} could not be applied",
            f"evaluate first: wasteddp evaluate {one.folder} --split {chosen_on if saved or chooses else 'test'}",
        )
    policy, chosen_groups = Policy(rules), None
    if chooses:
        there = saved[chosen_on][0]
        chosen_groups = _groups(*saved[chosen_on])
        policy = choose_policy(rules, _labels(there), there.probabilities_NK, max_error=max_error, level=level)
    views = saved[chosen_on][1]["options"].get("tta", "none") if chooses else None
    decisions = {}
    for split, (predictions, record) in saved.items():
        tta = record["options"].get("tta", "none")
        if views not in (None, tta):
            notes.append(
                f"{split} was evaluated with --tta {tta}, {chosen_on} with {views}: its decisions are not shown"
            )
            continue
        decisions[split] = decisions_record(
            policy,
            _labels(predictions),
            predictions.probabilities_NK,
            model={"weights": card.hashes.weights, "temperature": card.temperature, "tta": tta},
            split=split,
            chosen_on=chosen_on,
            groups=_groups(predictions, record),
            chosen_groups=dependent_groups(chosen_groups),
        )
    return replace(one, decisions=decisions, notes=(*one.notes, *notes))


def _groups(predictions: SavedPredictions, record: Mapping[str, Any]) -> SampleGroups | None:
    if not record.get("groups") or predictions.groups is None:
        return None
    return SampleGroups(record["groups"]["rule"], predictions.groups)


def _labels(predictions: SavedPredictions) -> Any:
    assert predictions.labels is not None  # of `evaluate`
    return predictions.labels


def _parts(record: Mapping[str, Any]) -> list[Part]:
    """Return 1,000 items by what happens to them, as whole numbers with the sum 1,000."""
    total = record["items"]
    alone = record["decided_alone"] * total
    wrong = alone * (record["error_alone"] or 0.0)
    people = sum(record["to_a_person"].values())
    exact = np.array([alone - wrong, wrong, record["hazard_decisions"], people]) * 1000 / total
    whole = np.floor(exact + 1e-9).astype(int)
    for row in np.argsort(-(exact - whole), kind="stable")[: max(0, 1000 - int(whole.sum()))]:  # largest remainders
        whole[row] += 1
    names = ("sorted alone, right bin", "sorted alone, wrong bin", "bin of a hazard", "a person")
    kinds = ("right", "wrong", "hazard", "person")
    return [Part(kind, name, int(items)) for kind, name, items in zip(kinds, names, whole, strict=True)]


def _verdict(record: Mapping[str, Any]) -> str:
    """Return whether the promised error held."""
    error = record["policy"]["error"]
    if not error:
        return "Nothing was promised: --max-error chooses a threshold with a guarantee."
    promised, ends = is_promised(record), record["error_alone_interval"]
    kept = outcome(record["error_alone"], error["max_error"], ends, at_most=True)
    words = in_words(kept, promised=promised)
    limit = _short(error["max_error"])
    if promised:
        text = f"At most {limit} was promised, with {_short(error['confidence'])} confidence: the promise {words}"
    else:
        text = f"The aim was at most {limit}: it {words}"
    if kept == "broken":
        return f"{text}; are these images of another origin than those of {record['chosen_on']}?"
    return f"{text}."


def _purity_sentence(bins: Sequence[Mapping[str, Any]]) -> str:
    known = sorted((row for row in bins if row["purity"][0] is not None), key=lambda row: -row["purity"][0])
    if not known:
        return ""
    best, worst = known[0], known[-1]
    text = f"The purest bin is {best['bin']}: {percent(best['purity'][0])} of what is in it belongs there"
    if len(known) == 1:
        return text + "."
    foreign = worst["contamination"][:1]
    most = f", and most of the rest is {foreign[0]['class']} ({percent(foreign[0]['share'])})" if foreign else ""
    return f"{text}. The least pure is {worst['bin']}: {percent(worst['purity'][0])}{most}."


def _bin_row(row: Mapping[str, Any]) -> BinRow:
    foreign = row["contamination"]
    named = [f"{one['class']} {percent(one['share'])}" for one in foreign[:_FOREIGN_NAMED]]
    rest = sum(one["share"] for one in foreign[_FOREIGN_NAMED:])
    return BinRow(
        row["bin"],
        row["items"],
        _share(row["purity"]),
        _share(row["recovery"]),
        ", ".join([*named, *([f"others {percent(rest)}"] if rest else [])]) or "–",
    )


def _share(values: Sequence[float | None]) -> Share:
    value, low, high = values
    if value is None:
        return Share(None, 0.0, 100.0)
    return Share(100 * value, 100 * (value if low is None else low), 100 * (value if high is None else high))


def _promises(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return (what, promised, chosen, what happened) of each threshold."""
    rows = []
    if error := record["policy"]["error"]:
        chosen = (
            f"a person below {percent(error['threshold'])}; on {record['chosen_on']}, {error['num_wrong']:,} of "
            f"{error['num_decided']:,} were wrong, bound {percent(error['bound'])}"
        )
        happened = percent(record["error_alone"]) if record["error_alone"] is not None else "nothing decided alone"
        if ends := record["error_alone_interval"]:
            happened += f" ({_range(ends)})"
        rows.append(("error of what is sorted alone", f"at most {_short(error['max_error'])}", chosen, happened))
    for name, one in record["hazards"].items():
        how = record["policy"]["hazards"][name]
        happened = percent(one["recall"]) if one["recall"] is not None else "no image here"
        if ends := one["recall_interval"]:
            happened += f" ({_range(ends)})"
        chosen = (
            f"hazard from {percent(how['threshold'])}; {how['num_missed']:,} of {how['num_hazards']:,} missed on "
            f"{record['chosen_on']}"
        )
        happened += f"; {one['false_alarms']:,} false alarms"
        rows.append((f"recall of {name}", f"at least {_short(one['floor'])}", chosen, happened))
    return rows


def _curve(record: Mapping[str, Any]) -> Curve:
    points = np.array(record["risk_coverage"])
    promised = record["promised_error"]
    error = record["error_alone"]
    top = max(float(points[:, 1].max()), promised or 0.0, error or 0.0, 0.01) * 1.1
    span = (0.0, min(1.0, top))
    return Curve(
        path=scaled_path(points[:, 0], points[:, 1], (0.0, 1.0), span),
        x_marks=scale_marks([0, 0.2, 0.4, 0.6, 0.8, 1.0], (0.0, 1.0)),
        y_marks=scale_marks(ticks(*span, most=5), span),
        point=None if error is None else (1000 * record["decided_alone"], 1000 - 1000 * error / span[1]),
        promised=None if promised is None else 1000 - 1000 * promised / span[1],
    )


def _points(values: Sequence[float]) -> str:
    """(0.031, 0.02, 0.05) -> 3.1 (2.0 to 5.0)"""
    value, low, high = (f"{100 * value:.1f}" for value in values)
    return f"{value} ({low} to {high})"


def _range(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f} to {percent(ends[1])}"


def _short(share: float) -> str:
    """0.02 -> 2 %, 0.995 -> 99.5 %"""
    return f"{100 * share:.4g} %"
