"""A shard set as large as its index says, on a few small real tars: for what grows with the number of samples."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from wasteddp.data.manifest import Manifest, Shard, Split, read_index
from wasteddp.files import sha256_of
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.sources.synthetic import KINDS, draw_folder

SHARD = 10_000  # samples of each


def synthetic_set(folder: Path, samples: int) -> Manifest:
    """`samples` samples in shards of 10,000, each shard an index of its own and a hard link to one of the real tars."""
    draw_folder(folder / "images", kinds=KINDS, images_per_class=20, size_px=256, seed=0)
    options = Options(fractions=(1.0, 0.0, 0.0), shard_mb=0.2)
    real = make_shards(Job(folder / "images", folder / "real", options), workers=2)
    sources = real.split("train").shards
    out = folder / "set"
    out.mkdir()
    shards, per_class = [], np.zeros(len(real.classes), np.int64)
    for number, first in enumerate(range(0, samples, SHARD)):
        source = sources[number % len(sources)]
        index = np.resize(read_index(real.folder, source), min(SHARD, samples - first))
        tar, idx = f"train-{number:06d}.tar", f"train-{number:06d}.idx"
        os.link(real.folder / source.tar, out / tar)
        (out / idx).write_bytes(index.tobytes())
        per_class += np.bincount(index["label"], minlength=len(per_class))
        shards.append(Shard(tar, idx, len(index), source.num_bytes, source.sha256, sha256_of(out / idx)))
    manifest = Manifest(
        folder=out,
        name="synthetic",
        classes=real.classes,
        splits={"train": Split("train", tuple(shards), tuple(int(n) for n in per_class))},
    )
    manifest.save()
    return Manifest.load(out)
