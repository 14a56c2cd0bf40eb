"""Plant wrong labels in a copy of a shard set, and measure how many of them `wasteddp review` finds.

    python -m launch.benchmarks.label_errors plant shards/trashnet --out /tmp/planted
    wasteddp train --config configs/trashnet-scratch.yaml --set data.shards=/tmp/planted/shards run.out=/tmp/planted/run
    wasteddp evaluate /tmp/planted/run --split val
    wasteddp evaluate /tmp/planted/run --split test
    python -m launch.benchmarks.label_errors measure /tmp/planted

The share is planted in every split, train included, since real errors are everywhere. Each wrong label is drawn
uniformly from the other classes. What the copy was wrong about before counts as a false alarm.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.sharding.build import Job, Options, make_shards


def plant(shards: Path, out: Path, *, share: float, seed: int) -> None:
    """Write `out/images/<split>/<class>/`, `out/planted.csv` and `out/shards`."""
    manifest = Manifest.load(shards)
    rng = np.random.default_rng(seed)
    rows = []
    for split in manifest.splits:
        with SplitReader(manifest, split) as reader:
            labels = reader.labels.copy()
            chosen = rng.choice(len(labels), round(share * len(labels)), replace=False)
            labels[chosen] += rng.integers(1, len(manifest.classes), len(chosen), dtype=np.int32)
            labels %= len(manifest.classes)
            for sample, (label, true) in enumerate(zip(labels.tolist(), reader.labels.tolist(), strict=True)):
                path = f"{split}/{manifest.classes[label]}/{Path(reader.source(sample)).name}"
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant wrong labels, and measure how many of them are found.")
    commands = parser.add_subparsers(required=True)
    planting = commands.add_parser("plant")
    planting.add_argument("shards", type=Path)
    planting.add_argument("--out", type=Path, required=True)
    planting.add_argument("--share", type=float, default=0.05)
    planting.add_argument("--seed", type=int, default=0)
    planting.set_defaults(run=lambda a: plant(a.shards, a.out, share=a.share, seed=a.seed))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
