"""Data sets of the benchmarks: a small drawn set, a split as a folder of class folders, and a large synthetic set."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import numpy as np

from wasteddp.data.manifest import Manifest, Shard, Split, read_index
from wasteddp.files import sha256_of
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.sources.synthetic import KINDS, draw_folder

NUM_CLASSES = len(KINDS)
_LEAST_PX = 32
SHARD = 10_000  # samples of each


def drawn_set(folder: Path, *, num_images: int, size_px: int) -> Path:
    """Create a drawn set with at least `num_images` in its training split and a few in "val". Return its folder."""
    per_class = -(-num_images * 4 // (3 * NUM_CLASSES)) + 4
    draw_folder(folder / "images", kinds=KINDS, images_per_class=per_class, size_px=max(size_px, _LEAST_PX), seed=0)
    make_shards(Job(folder / "images", folder / "shards", Options(fractions=(0.8, 0.2, 0.0))), workers=1)
    return folder / "shards"


def unpack(shards: Path, out: Path, *, split: str) -> None:
    """Write the images of a split of the set in `shards` to a folder of class folders.

    Raises:
        SystemExit: the set does not have the split.
    """
    tars = sorted(shards.glob(f"{split}-*.tar"))
    if not tars:
        raise SystemExit(f"{shards} has no {split}-*.tar, which all sides read; create it with `wasteddp shard`")
    for tar in tars:
        with tarfile.open(tar) as members:
            image, name = b"", ""
            for member in members:
                file = members.extractfile(member)
                content = file.read() if file else b""
                if member.name.endswith(".json"):
                    folder = out / json.loads(content)["label"]
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(image)
                else:
                    image, name = content, Path(member.name).name


def synthetic_set(folder: Path, samples: int) -> Manifest:
    """Create a set of `samples` samples in shards of 10,000. Each has an index and a hard link to a small real tar."""
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
