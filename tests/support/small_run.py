"""A small finished run, for the tests of commands after training: 3 classes, tiny JPEGs, a random ResNet18."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from wasteddp.data.manifest import INDEX_DTYPE, Manifest
from wasteddp.inference.bundle import BundleCard, Hashes, Preprocessing, Trained, save_bundle
from wasteddp.model.networks import build
from wasteddp.sharding.build import Job, Options, make_shards

CLASSES = ("glass", "metal", "paper")
BINS = {"glass": "green bin", "metal": "yellow bin", "paper": "blue bin"}
TEST_IMAGES = (5, 3, 2)  # per class; 10 in total, so that one batch of 8 is full and one is padded

CARD = BundleCard(
    arch="resnet18",
    classes=CLASSES,
    preprocessing=Preprocessing(32, 36, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    trained=Trained(step=120, epoch=3, metric="val/macro_f1", value=0.5),
    hashes=Hashes(manifest="0" * 64, settings="1" * 64, code="0.1.0"),
    tool="wasteddp 0.1.0",
    bins=BINS,
)


def write_image(path: Path, seed: int, size: tuple[int, int] = (48, 40)) -> Path:
    """Write an image of coloured patches, different for each seed, in the format of the suffix."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(patches).resize(size, Image.Resampling.BILINEAR).save(path)
    return path


def write_images(folder: Path, counts: Mapping[str, tuple[int, ...]], classes: tuple[str, ...] = CLASSES) -> Path:
    """Write `folder/<split>/<class>/<number>.jpg`, `counts[split]` images of each class."""
    seed = 0
    for split, numbers in counts.items():
        for name, count in zip(classes, numbers, strict=True):
            for number in range(count):
                write_image(folder / split / name / f"{number}.jpg", seed)
                seed += 1
    return folder


def write_shards(out: Path, source: Path, bins: Mapping[str, str]) -> Manifest:
    """Write a shard set with at least two shards in its test split."""
    manifest = make_shards(Job(source, out, Options(shard_mb=0.008), bins=bins), workers=1)
    assert len(manifest.split("test").shards) >= 2
    return manifest


def random_weights(seed: int = 0, num_classes: int = len(CLASSES)) -> dict[str, torch.Tensor]:
    """Return a ResNet18 whose answers differ between images; those of a new head are nearly the same."""
    torch.manual_seed(seed)
    state = build("resnet18", num_classes).state_dict()
    return {**state, "fc.weight": state["fc.weight"] * 30}


def write_run(folder: Path, test_images: tuple[int, ...] = TEST_IMAGES) -> Path:
    """Write `folder/images`, `folder/shards` and `folder/run` with a model. Return the run's folder."""
    source = write_images(folder / "images", {"train": (1, 1, 1), "test": test_images})
    manifest = write_shards(folder / "shards", source, BINS)
    run = folder / "run"
    save_bundle(run / "model", replace(CARD, hashes=replace(CARD.hashes, manifest=manifest.sha256)), random_weights())
    (run / "settings.yaml").write_text(f"data:\n  shards: {folder / 'shards'}\n")
    return run


def change_manifest(shards: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((shards / "manifest.json").read_text())
    change(content)
    (shards / "manifest.json").write_text(json.dumps(content))


def overwrite_image(shards: Path, content: bytes, *, fix_index: bool) -> str:
    """Write `content` over the first bytes of the test split's third image. Return the tar's name.

    Args:
        fix_index: let the index contain the hash of the result.
    """
    manifest = json.loads((shards / "manifest.json").read_text())
    shard = manifest["splits"]["test"]["shards"][0]
    index = np.frombuffer((shards / shard["index"]).read_bytes(), INDEX_DTYPE).copy()
    offset, length = int(index[2]["offset"]), int(index[2]["length"])
    with (shards / shard["tar"]).open("r+b") as tar:
        tar.seek(offset)
        tar.write(content)
        tar.seek(offset)
        index[2]["sha256"] = np.frombuffer(hashlib.sha256(tar.read(length)).digest(), np.uint8)
    if fix_index:
        (shards / shard["index"]).write_bytes(index.tobytes())
        digest = hashlib.sha256(index.tobytes()).hexdigest()
        change_manifest(shards, lambda m: m["splits"]["test"]["shards"][0].update(index_sha256=digest))
    return str(shard["tar"])
