"""A small drawn shard set, for benchmarks that need real batches and none images in particular."""

from __future__ import annotations

from pathlib import Path

from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.sources.synthetic import KINDS, draw_folder

NUM_CLASSES = len(KINDS)
_LEAST_PX = 32


def drawn_set(folder: Path, *, num_images: int, size_px: int) -> Path:
    """The folder of a set with at least `num_images` in its training split and a few in "val"."""
    per_class = -(-num_images * 4 // (3 * NUM_CLASSES)) + 4
    draw_folder(folder / "images", kinds=KINDS, images_per_class=per_class, size_px=max(size_px, _LEAST_PX), seed=0)
    make_shards(Job(folder / "images", folder / "shards", Options(fractions=(0.8, 0.2, 0.0))), workers=1)
    return folder / "shards"
