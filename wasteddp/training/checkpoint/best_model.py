"""Writes the best model of a run: the bundle that `predict` loads, and the evaluation that selected it."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from wasteddp import __version__
from wasteddp.data.manifest import Manifest
from wasteddp.decisions.calibration import calibrate
from wasteddp.errors import DecisionError, WastedError
from wasteddp.inference.bundle import (
    Averaged,
    BundleCard,
    Hashes,
    Preprocessing,
    Trained,
    find_bundle,
    read_card,
    save_bundle,
)
from wasteddp.inference.evaluation_files import save_seen
from wasteddp.inference.metrics import Seen
from wasteddp.inference.model_card.file import write_model_card
from wasteddp.settings import Settings
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime


def save_best(
    weights: Mapping[str, torch.Tensor],
    *,
    card: BundleCard,
    seen: Seen,
    out: Path,
    shards: str,
    runtime: Runtime,
    data: Inputs,
) -> None:
    """Write the bundle, then its evaluation and the model card. Rank 0, in the thread that writes checkpoints.

    Args:
        out: folder of the run.
        shards: data.shards, for the record of the evaluation.
    """
    calibrated = card
    if seen.labels_N is not None and seen.probabilities_NK is not None:
        with contextlib.suppress(DecisionError):  # too few images: `wasteddp calibrate` says how many would do
            found = calibrate(seen.labels_N, seen.probabilities_NK, split=seen.split)
            calibrated = replace(card, temperature=found.temperature, calibration=found.to_json())
    card = replace(card, hashes=save_bundle(out / "model", calibrated, weights).hashes)  # evaluated without calibration
    save_seen(
        out / "evaluations" / seen.split,
        seen,
        data.val_reader.source,
        card,
        manifest_sha256=data.manifest.sha256,
        options={
            "split": seen.split,
            "shards": shards,
            "by": "training",
            "precision": runtime.precision,
            "device": runtime.device.type,
        },
    )
    describe_model_card(out, data.manifest)  # its line is printed at the end of the training


def describe_calibration(run: Path) -> str:
    """Return a line on the calibration of the run's model; "" if there is no model, or it cannot be read."""
    try:
        card = read_card(find_bundle(run))
    except WastedError:
        return ""
    if card.calibration:
        return f"probabilities: calibrated on {card.calibration['num_samples']:,} images of {card.calibration['split']}"
    return (
        "probabilities: not calibrated, since the evaluation has too few images, or too many to keep; "
        f"this says how many would do: wasteddp calibrate {shlex.quote(str(run))}"
    )


def describe_model_card(run: Path, manifest: Manifest) -> str:
    """Write the model's README.md again and return a line on it. A failure does not end the run."""
    try:
        return write_model_card(run, manifest=manifest)
    except WastedError as error:
        return f"model card: not written, {error.found}; it is written after: wasteddp evaluate {shlex.quote(str(run))}"


def card_of(settings: Settings, manifest: Manifest, progress: Progress, *, epoch: int, commit: str) -> BundleCard:
    """Return the card of the bundle for the current model, which is the best so far."""
    assert progress.best_value is not None  # the model was evaluated
    return BundleCard(
        arch=settings.model.arch,
        classes=manifest.classes,
        preprocessing=Preprocessing(
            image_size_px=settings.data.eval_size_px,
            resize_px=settings.data.eval_resize_px,
            mean=settings.model.mean,
            std=settings.model.std,
        ),
        trained=Trained(step=progress.step, epoch=epoch, metric=settings.evaluate.metric, value=progress.best_value),
        hashes=Hashes(
            manifest=manifest.sha256,
            settings=hashlib.sha256(settings.to_yaml().encode()).hexdigest(),
            code=commit,
            teacher=progress.lineage.teacher,
        ),
        tool=f"wasteddp {__version__}",
        bins=dict(manifest.bins),
        averaged=Averaged(ema_decay=settings.train.ema_decay),
    )
