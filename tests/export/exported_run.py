"""A small run with a validation split, to export: 3 classes, a narrow ResNet18 with random weights, a policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pictures import jpeg
from small_run import BINS, CARD, CLASSES, random_weights

from wasteddp.decisions.decide import BinRules, Policy
from wasteddp.decisions.thresholds import ErrorThreshold
from wasteddp.inference.bundle import save_bundle
from wasteddp.inference.policy_files import ChosenPolicy, save_policy
from wasteddp.sharding.build import Job, Options, make_shards

NUM_VAL = 12


def write_exported_run(folder: Path) -> Path:
    """Write `folder/shards` and `folder/run` with a calibrated model and policy.json. Return the run's folder."""
    seed = 0
    for split, count in (("train", 4), ("val", NUM_VAL // 3)):
        for name in CLASSES:
            for number in range(count):
                seed += 1
                path = folder / "images" / split / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                # some are decoded at a fraction of their size
                path.write_bytes(jpeg(seed, size=(48, 40) if number % 2 else (301, 260)))
    manifest = make_shards(Job(folder / "images", folder / "shards", Options(), bins=BINS), workers=1)
    weights = random_weights(4)  # several classes, and some in doubt
    for name, tensor in weights.items():  # statistics as those of a training, not 0 and 1
        if name.endswith(("running_mean", "bn1.bias", "bn2.bias")):
            tensor += 0.1 * torch.randn_like(tensor)
    card = replace(CARD, temperature=1.7, hashes=replace(CARD.hashes, manifest=manifest.sha256))
    run = folder / "run"
    card = save_bundle(run / "model", card, weights)
    (run / "settings.yaml").write_text(f"data:\n  shards: {folder / 'shards'}\n")
    policy = Policy(BinRules.of_map(BINS, CLASSES), ErrorThreshold(0.6, 0.05, 0.95, 0.04, 50, 40, 0))
    save_policy(run / "policy.json", ChosenPolicy(policy, "val"), card, tta="none")
    return run


def photos(folder: Path) -> list[Path]:
    found = sorted((folder / "images" / "val").rglob("*.jpg"))
    assert len(found) == NUM_VAL
    assert len(np.unique([path.stat().st_size for path in found])) > 1
    return found
