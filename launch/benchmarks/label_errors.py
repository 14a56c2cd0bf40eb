"""Plant wrong labels in a copy of a shard set, and measure how many of them `wasteddp review` finds.

    python -m launch.benchmarks.label_errors plant shards/trashnet --out /tmp/planted
    wasteddp train --config configs/trashnet-scratch.yaml --set data.shards=/tmp/planted/shards run.out=/tmp/planted/run
    wasteddp evaluate /tmp/planted/run --split val
    wasteddp evaluate /tmp/planted/run --split test
    python -m launch.benchmarks.label_errors measure /tmp/planted

The share is planted in every split, train included, since real errors are everywhere. Each wrong label is drawn
uniformly from the other classes. Labels that were wrong before count as false alarms. `measure` reads the evaluations
of val and test, of a model that was trained on the wrong labels of train.

Legend: N images, K classes.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import numpy as np

from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.decisions.intervals import wilson_interval
from wasteddp.decisions.labelling import find_label_errors
from wasteddp.inference.metrics import percent
from wasteddp.inference.prediction_files import read_predictions
from wasteddp.sharding.build import Job, Options, make_shards


def plant(shards: Path, out: Path, *, share: float, seed: int) -> None:
    """Write `out/images/<split>/<class>/`, `out/planted.csv` and `out/shards`."""
    manifest = Manifest.load(shards)
    (out / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for split in manifest.splits:
        with SplitReader(manifest, split) as reader:
            labels = reader.labels.copy()
            chosen = rng.choice(len(labels), round(share * len(labels)), replace=False)
            labels[chosen] += rng.integers(1, len(manifest.classes), len(chosen), dtype=np.int32)
            labels %= len(manifest.classes)
            for sample, (label, true) in enumerate(zip(labels.tolist(), reader.labels.tolist(), strict=True)):
                folder, name = f"{split}/{manifest.classes[label]}", Path(reader.source(sample)).name
                path = f"{folder}/{name}"
                if (out / "images" / path).exists():
                    path = f"{folder}/{sample}-{name}"
                file = out / "images" / path
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("xb") as target:
                    target.write(reader.read(sample))
                if label != true:
                    rows.append((path, manifest.classes[label], manifest.classes[true]))
    with (out / "planted.csv").open("w", newline="") as table:
        csv.writer(table).writerows([("path", "label", "class"), *rows])
    make_shards(Job(out / "images", out / "shards", Options(), bins=manifest.bins), workers=1)
    print(f"{len(rows)} wrong labels planted: {out / 'planted.csv'}")


def measure(folder: Path) -> None:
    """Print how many of the planted errors in val and test are found, with 95 % intervals."""
    classes = Manifest.load(folder / "shards").classes
    text = (folder / "planted.csv").read_text()
    true_of = {row["path"]: classes.index(row["class"]) for row in csv.DictReader(io.StringIO(text, newline=""))}
    splits = [read_predictions(folder / f"run/evaluations/{name}/predictions.csv", classes) for name in ("val", "test")]
    paths = [path for one in splits for path in one.paths]
    labels_N = np.concatenate([one.labels for one in splits if one.labels is not None])
    p_NK = np.concatenate([one.probabilities_NK for one in splits])
    is_wrong_N = np.array([path in true_of for path in paths])
    true_N = np.array([true_of.get(path, label) for path, label in zip(paths, labels_N.tolist(), strict=True)])

    num_wrong, predicted_N = int(is_wrong_N.sum()), p_NK.argmax(axis=1)
    accuracy, as_given = (float((predicted_N == labels).mean()) for labels in (true_N, labels_N))
    print(f"{len(paths)} images, {num_wrong} with a planted error")
    print(f"accuracy {percent(accuracy)} on the labels before, {percent(as_given)} on those with errors")
    found = find_label_errors(labels_N, p_NK)
    by_confidence = np.argsort(p_NK[np.arange(len(paths)), labels_N], kind="stable")
    print(f"estimated number of wrong labels: {found.num_expected:.0f}")
    print("| named | images | precision | recall | class is right |\n| --- | ---: | ---: | ---: | ---: |")
    for name, images, suggested in (
        ("confident learning, all", found.images, found.classes),
        (f"confident learning, the first {num_wrong}", found.images[:num_wrong], found.classes),
        (f"confident learning, the first {2 * num_wrong}", found.images[: 2 * num_wrong], found.classes),
        ("prediction is not the label, all", np.flatnonzero(predicted_N != labels_N), None),
        (f"least probability of the label, the first {num_wrong}", by_confidence[:num_wrong], None),
    ):
        hits_M = is_wrong_N[images]
        classes_M = predicted_N[images] if suggested is None else suggested[: len(images)]
        hits, is_right = int(hits_M.sum()), int((hits_M & (classes_M == true_N[images])).sum())
        cells = (name, len(images), _share(hits, len(images)), _share(hits, num_wrong), f"{is_right} of {hits}")
        print("| " + " | ".join(map(str, cells)) + " |")


def _share(part: int, whole: int) -> str:
    low, high = wilson_interval(part, whole)
    return f"{percent(part / whole)} ({percent(low)} to {percent(high)})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant wrong labels, and measure how many of them are found.")
    commands = parser.add_subparsers(required=True)
    planting = commands.add_parser("plant")
    planting.add_argument("shards", type=Path)
    planting.add_argument("--out", type=Path, required=True)
    planting.add_argument("--share", type=float, default=0.05)
    planting.add_argument("--seed", type=int, default=0)
    planting.set_defaults(run=lambda a: plant(a.shards, a.out, share=a.share, seed=a.seed))
    measuring = commands.add_parser("measure")
    measuring.add_argument("folder", type=Path)
    measuring.set_defaults(run=lambda a: measure(a.folder))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
