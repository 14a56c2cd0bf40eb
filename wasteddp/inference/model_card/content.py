"""The text of a model's card, from the bundle's `model.json`, the manifest of its set, and its evaluations.

A figure that was not measured is not in it; the text says that it is missing and how to measure it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wasteddp import __version__
from wasteddp.data.manifest import Manifest
from wasteddp.decisions.intervals import describe_groups, wilson_interval
from wasteddp.decisions.thresholds import is_promised, no_promise
from wasteddp.inference.bundle import CARD_NAME, BundleCard
from wasteddp.inference.metrics import percent
from wasteddp.inference.model_card.markup import front_matter, literal, one_line, table

_FEW_IMAGES = 30  # of a class in a split: the 95 % interval of its recall is up to 34 points wide with so many
_COMMENT = "# The license of the model is yours to choose: add a line such as `license: mit`. It is kept."


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a model's weights. `decisions` are of a split, at the present temperature."""

    evaluations: Sequence[Mapping[str, Any]]
    decisions: Mapping[str, Mapping[str, Any]]
    num_other: int  # evaluations in the folder that are of other weights, or cannot be read


def describe_model(name: str, card: BundleCard, manifest: Manifest | None, measured: Measured) -> str:
    """Return the card's text.

    Args:
        name: of the run.
        manifest: of the set that the model was trained on; None: it cannot be read.
    """
    parts = [
        front_matter(_metadata(name, card, manifest, measured), _COMMENT) + "---",
        f"# {literal(name)}",
        _opening(card),
        *_data(card, manifest),
        *_classes(card, manifest),
        *_metrics(card, measured),
        *_calibration(card),
        *_decisions(measured),
        *_limits(card, measured),
        *_loading(card),
        *_origin(card),
    ]
    return "\n\n".join(parts) + "\n\n"


def _opening(card: BundleCard) -> str:
    tool = literal(f"wasteddp {__version__}")
    return (
        f"A {literal(card.arch)} that classifies images into {len(card.classes)} classes. {tool} wrote this card from "
        "what it measured. No program reads a figure from it, and `wasteddp verify` does not check it: it checks "
        f"`{CARD_NAME}` and the files that this names."
    )


def _metadata(name: str, card: BundleCard, manifest: Manifest | None, measured: Measured) -> dict[str, Any]:
    set_name = one_line(manifest.name) if manifest else "not known"
    results = []
    for record in measured.evaluations:
        split = one_line(record["options"]["split"])
        is_other = "images" in record["options"]
        dataset: dict[str, Any] = {
            "name": f"images {split}" if is_other else set_name,
            "type": "image-folder" if is_other else "webdataset",
            "split": split,
            "args": {"sha256": record["hashes"]["manifest"]},
        }
        figures = (("accuracy", "Accuracy", "accuracy"), ("f1", "Macro F1", "macro_f1"))
        found = [
            {"type": kind, "name": title, "value": round(float(record[key]), 6)}
            for kind, title, key in (*figures, ("recall", "Macro recall", "macro_recall"))
            if record[key] is not None
        ]
        results.append({"task": {"type": "image-classification"}, "dataset": dataset, "metrics": found})
    values: dict[str, Any] = {
        "library_name": "wasteddp",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "waste", "pytorch", one_line(card.arch)],
    }
    if manifest:
        values["datasets"] = [set_name]
    if results:
        values["metrics"] = ["accuracy", "f1", "recall"]
        values["model-index"] = [{"name": one_line(name) or "model", "results": results}]
    return values


def _data(card: BundleCard, manifest: Manifest | None) -> Iterator[str]:
    yield "## Data"
    if manifest is None:
        yield (
            "The shard set that the model was trained on could not be read when this card was written. The sha256 of "
            f"its manifest is `{_hex(card.hashes.manifest)}`."
        )
        return
    yield f"Shard set {literal(manifest.name)}, sha256 of its manifest `{_hex(manifest.sha256)}`."
    counts = [[literal(split.name), f"{split.num_samples:,}"] for split in manifest.splits.values()]
    yield table(["split", "images"], counts)
    facts = [f"{len(manifest.left_out):,} images of the source were left out."]
    if manifest.groups:
        rule = literal(str(manifest.groups["rule"]))
        facts.append(f"The images are of {manifest.groups['num_groups']:,} groups ({rule}); no group is in two splits.")
    if isinstance(licence := manifest.recipe.get("licence"), str):
        facts.append(f"Licence of the images, as their recipe states it: {literal(licence)}.")
    yield " ".join(facts)


def _classes(card: BundleCard, manifest: Manifest | None) -> Iterator[str]:
    yield "## Classes and bins"
    splits = list(manifest.splits.values()) if manifest and manifest.classes == card.classes else []
    head = ["class", *(["bin"] if card.bins else []), *(f"images of {literal(split.name)}" for split in splits)]
    yield table(
        head,
        (
            [
                literal(name),
                *([literal(card.bins.get(name, ""))] if card.bins else []),
                *(f"{split.samples_per_class[number]:,}" for split in splits),
            ]
            for number, name in enumerate(card.classes)
        ),
    )


def _metrics(card: BundleCard, measured: Measured) -> Iterator[str]:
    yield "## Metrics"
    if not measured.evaluations:
        yield "These weights were not evaluated yet: `wasteddp evaluate RUN`."
    else:
        yield table(
            ["split", "images", "accuracy (95 % interval)", "macro F1", "macro recall", "how"],
            (
                [
                    literal(record["options"]["split"]),
                    f"{record['num_samples']:,}",
                    f"{percent(record['accuracy'])} ({_range([record['accuracy_low'], record['accuracy_high']])})",
                    _share(record["macro_f1"]),
                    _share(record["macro_recall"]),
                    _how(card, record),
                ]
                for record in measured.evaluations
            ),
        )
        for line in dict.fromkeys(describe_groups(record.get("groups")) for record in measured.evaluations):
            if line:
                yield f"{literal(line[:1].upper() + line[1:])}."
        yield from _by_class(measured.evaluations[0])
    if measured.num_other:
        yield f"Evaluations next to the model that are of other weights or cannot be read: {measured.num_other}."


def _how(card: BundleCard, record: Mapping[str, Any]) -> str:
    options, temperature = record["options"], record["model"]["temperature"]
    if options.get("by") == "training":
        return "during training, before calibration; the weights were selected on this split"
    tta = str(options.get("tta", "none"))
    parts = ["one view" if tta == "none" else f"mean over views ({literal(tta)})"]
    parts += ["images of another source"] if "images" in options else []
    parts += [f"at temperature {temperature:.4f}"] if temperature != card.temperature else []
    return "; ".join(parts)


def _by_class(record: Mapping[str, Any]) -> Iterator[str]:
    confusion = np.asarray(record["confusion"])
    groups = record.get("groups") or {}
    unknown = [None] * len(confusion)
    yield f"By class, on {literal(record['options']['split'])}, with 95 % intervals:"
    rows = []
    for number, name in enumerate(record["classes"]):
        cells = [literal(name), f"{int(confusion[number].sum()):,}"]
        for key, whole in (("recall", confusion[number].sum()), ("precision", confusion[:, number].sum())):
            hits, of_groups = int(confusion[number, number]), (groups.get(key) or unknown)[number]
            ends = of_groups or list(wilson_interval(hits, int(whole)))
            cells.append(f"{percent(hits / whole)} ({_range(ends)})" if whole else "–")
        rows.append(cells)
    yield table(["class", "images", "recall", "precision"], rows)


def _calibration(card: BundleCard) -> Iterator[str]:
    yield "## Calibration"
    found = card.calibration
    if not found:
        yield (
            "The probabilities are not calibrated: the model may be surer than it is right. `wasteddp calibrate RUN` "
            "calibrates them, or says how many images are missing."
        )
        return
    over = f"{found['num_groups']:,} groups" if found.get("num_groups") else "images"
    yield (
        f"Temperature {found['temperature']:.4f}, fitted on {found['num_samples']:,} images of "
        f"{literal(found['split'])} (Guo et al. 2017). Figures on these same images, with 95 % intervals by resampling "
        f"{over}:"
    )
    yield table(
        ["", "before", "after"],
        [
            ["expected calibration error", _with_range(found["ece_before"]), _with_range(found["ece_after"])],
            ["mean negative log-likelihood, nats", f"{found['nll_before']:.4f}", f"{found['nll_after']:.4f}"],
        ],
    )


def _decisions(measured: Measured) -> Iterator[str]:
    yield "## Thresholds and guarantees"
    if not measured.decisions:
        yield "No thresholds were chosen for these weights and this temperature: `wasteddp evaluate RUN --bins FILE`."
    for split, record in measured.decisions.items():
        policy = record["policy"]
        yield (
            f"On {literal(split)} with the bins of {literal(policy['name'] or 'the shard set')}: "
            f"{percent(record['decided_alone'])} of {record['items']:,} images are decided alone."
        )
        rows, promised = [], is_promised(record)

        def confidence(one: Mapping[str, Any], promised: bool = promised) -> str:
            return f", confidence {percent(one['confidence'])}" if promised else ""

        if error := policy["error"]:
            rows.append(
                [
                    "error of what is decided alone",
                    f"at most {percent(error['max_error'])}{confidence(error)}",
                    _share(record["error_alone"]) + _interval(record["error_alone_interval"]),
                    f"probability of the bin from {error['threshold']:.4f}, chosen on {literal(record['chosen_on'])}",
                ]
            )
        for name, one in record["hazards"].items():
            rows.append(
                [
                    f"recall of the hazard {literal(name)}",
                    f"at least {percent(one['floor'])}{confidence(one)}",
                    _share(one["recall"])
                    + _interval(one["recall_interval"])
                    + f"; {one['false_alarms']:,} false alarms",
                    f"probability of it from {policy['hazards'][name]['threshold']:.4f}, chosen on "
                    f"{literal(record['chosen_on'])}",
                ]
            )
        if rows:
            head = "promised" if promised else "aim, not a promise"
            yield table(["what", head, f"measured on {literal(split)}", "threshold"], rows)
        elif record["error_alone"] is not None:
            yield f"No error was promised; {_share(record['error_alone'])} of these are in a wrong bin."
        yield table(
            ["bin", "items", "purity", "recovery", "most of the rest"],
            (
                [
                    literal(row["bin"]),
                    f"{row['items']:,}",
                    _with_range(row["purity"]),
                    _with_range(row["recovery"]),
                    ", ".join(f"{literal(one['class'])} {percent(one['share'])}" for one in row["contamination"][:3]),
                ]
                for row in record["bins"]
            ),
        )
        if line := no_promise(record):
            yield f"{literal(line[:1].upper() + line[1:])}."
        if line := describe_groups(record["groups"]):
            yield f"{literal(line[:1].upper() + line[1:])}."
        if record["split"] == record["chosen_on"] and rows:
            yield "The thresholds were chosen on these same images, so the measured figures are too good."


def _limits(card: BundleCard, measured: Measured) -> Iterator[str]:
    yield "## Limits"
    lines = [
        "The figures hold for images of the same origin as those of the set; on images of another origin, expect less.",
        "They are of images of single items: they are not the purity or the recovery of a plant.",
    ]
    if card.hashes.features:
        lines.append(
            "`wasteddp predict` compares images with a summary of the training images, and reports how unlike them "
            "they are."
        )
    else:
        lines.append(
            "The bundle has no summary of its training images, so images of another origin are not noticed; "
            "`wasteddp features RUN` adds it."
        )
    for record in measured.evaluations[:1]:
        split = literal(record["options"]["split"])
        counts = np.asarray(record["confusion"]).sum(1)
        few = [f"{literal(name)} ({n})" for name, n in zip(record["classes"], counts, strict=True) if n < _FEW_IMAGES]
        if few:
            lines.append(
                f"Fewer than {_FEW_IMAGES} images of {split} are {', '.join(few)}: their figures are uncertain."
            )
        if near := record.get("near_duplicates_in_train"):
            lines.append(
                f"{near['num_near']:,} images of {split} have a near-duplicate among the training images; accuracy "
                f"without them: {_share(near['without'].get('accuracy'))} of {near['without']['num_images']:,} images."
            )
    if measured.decisions:
        lines.append("The guarantees assume images that are independent of each other, and the same --tta.")
    selected = {
        literal(record["chosen_on"])
        for record in measured.decisions.values()
        if record.get("selected", True) and (record["policy"]["error"] or record["hazards"])
    }
    if selected:
        lines.append(
            f"The thresholds were chosen on {', '.join(sorted(selected))}, on which the best checkpoint was selected "
            "too, so the guarantees are somewhat too good; `wasteddp evaluate --choose-on SPLIT` takes another split."
        )
    yield "\n".join(f"- {line}" for line in lines)


def _loading(card: BundleCard) -> Iterator[str]:
    size = card.preprocessing
    yield "## How to load"
    yield (
        "```\n"
        'wasteddp predict FOLDER "new/*.jpg"       # the folder of this file\n'
        "```\n\n"
        "```python\n"
        "import wasteddp\n\n"
        'model = wasteddp.load("FOLDER")           # checks the sha256 of all files\n'
        'model.predict(["new/1.jpg"])              # class_name, probability, bin, decision, unlikeness of each\n'
        "```"
    )
    yield (
        f"An image is resized to {size.resize_px} px on its shorter side, and its centre of {size.image_size_px} px is "
        "normalised with the mean and the standard deviation in `model.json`. Logits are divided by the temperature."
    )


def _origin(card: BundleCard) -> Iterator[str]:
    trained, hashes = card.trained, card.hashes
    rows = [
        ["weights", f"`{_hex(hashes.weights)}`"],
        ["shard set (manifest)", f"`{_hex(hashes.manifest)}`"],
        ["settings", f"`{_hex(hashes.settings)}`"],
        *([["weights of the teacher", f"`{_hex(hashes.teacher)}`"]] if hashes.teacher else []),
        *([["features of training images", f"`{_hex(hashes.features)}`"]] if hashes.features else []),
        ["code", literal(hashes.code)],
        ["step, epoch", f"{trained.step:,}, {trained.epoch}"],
        ["selected by", literal(trained.metric)],
        *([["the weights are a", literal(str(card.averaged))]] if str(card.averaged) else []),
    ]
    yield "## Origin"
    yield table(["", "sha256 or name"], rows)


def _hex(text: str) -> str:
    """Return the hexadecimal digits of a hash, so that nothing else can leave a code span."""
    return "".join(letter for letter in text if letter in "0123456789abcdef")


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)


def _range(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def _interval(ends: Sequence[float] | None) -> str:
    return f" ({_range(ends)})" if ends else ""


def _with_range(values: Sequence[float | None]) -> str:
    value, low, high = values
    if value is None:
        return "–"
    return percent(value) + ("" if low is None or high is None else f" ({_range([low, high])})")
