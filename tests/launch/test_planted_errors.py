"""The program that plants wrong labels, and its measurement."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from small_run import BINS, CLASSES, write_images, write_shards

from launch.benchmarks.label_errors import measure, plant
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader


def test_planted_errors_are_in_the_set_and_a_perfect_model_finds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_images(tmp_path / "images", {"train": (8, 6, 6), "val": (8, 6, 6), "test": (8, 8, 4)})
    write_shards(tmp_path / "shards", source, BINS)
    out = tmp_path / "out"
    plant(tmp_path / "shards", out, share=0.1, seed=1)
    rows = list(csv.DictReader(io.StringIO((out / "planted.csv").read_text())))
    assert [row["path"].split("/")[0] for row in rows] == ["train", "train", "val", "val", "test", "test"]
    assert all(row["label"] != row["class"] for row in rows)

    manifest, true_of = Manifest.load(out / "shards"), {row["path"]: row["class"] for row in rows}
    assert manifest.classes == CLASSES
    assert manifest.bins == BINS
    for split in ("val", "test"):
        lines = ["source,true,predicted," + ",".join(f"p_{name}" for name in CLASSES)]
        with SplitReader(manifest, split) as reader:
            for sample, label in enumerate(reader.labels.tolist()):
                path = reader.source(sample)
                true = true_of.get(path, CLASSES[label])
                p = np.where(np.array(CLASSES) == true, 0.8, 0.1)
                lines.append(",".join((path, CLASSES[label], true, *map(str, p))))
        folder = out / "run/evaluations" / split
        folder.mkdir(parents=True)
        (folder / "predictions.csv").write_text("\n".join(lines))
    capsys.readouterr()
    measure(out)
    printed = capsys.readouterr().out
    assert "40 images, 4 with a planted error\naccuracy 100.0 % on the labels before, 90.0 % on those" in printed
    assert (
        "| confident learning, all | 4 | 100.0 % (51.0 % to 100.0 %) | 100.0 % (51.0 % to 100.0 %) | 4 of 4 |"
        in printed
    )
    assert "| prediction is not the label, all | 4 | 100.0 %" in printed
