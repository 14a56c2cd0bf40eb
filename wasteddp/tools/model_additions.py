"""`wasteddp calibrate` and `wasteddp features`: what is added to the model of a finished run.

The temperature is fitted on a split and kept in the model's card. The features of training images are for a model that
has none, such as an older one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from wasteddp.data import dataset
from wasteddp.data.decoding.workers import start_workers
from wasteddp.decisions.calibration import Calibration, calibrate
from wasteddp.decisions.intervals import describe_groups
from wasteddp.errors import BundleError, DecisionError, inert
from wasteddp.files import hold_run
from wasteddp.inference.any_classifier import save_features
from wasteddp.inference.bundle import (
    FOLDER_NAME,
    find_bundle,
    load_bundle,
    read_card,
    refuse_other_weights,
    replace_card,
)
from wasteddp.inference.classifier import Classifier, device_type
from wasteddp.inference.evaluate import check_classes, data_of, evaluate_split
from wasteddp.inference.metrics import percent
from wasteddp.inference.model_card.file import write_model_card
from wasteddp.parallel import progress
from wasteddp.training.features import MOST_REFERENCE, MOST_TRAINING, summarise_training


def add_calibration(
    run_folder: Path,
    *,
    split: str = "",
    shards: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    workers: int | str = 0,
) -> None:
    """Calibrate, write the card and print what changed. The weights and the predicted classes stay the same.

    Args:
        split: to fit on; "": the one that the run evaluated on (data.eval_split).

    Raises:
        DecisionError: the split has too few images, or the model was trained on it; the card stays as it is.
        BundleError: a training replaced the model meanwhile.
    """
    console = Console()
    with hold_run(run_folder, print):  # a training that runs is found before the evaluation
        card, state_dict = load_bundle(run_folder)
    plain = replace(card, temperature=1.0, calibration={})
    classifier = Classifier(plain, state_dict, device=device, batch_size=batch_size, where=run_folder)
    data = data_of(run_folder, shards)
    split = split or data.eval_split
    if split == data.train_split:
        raise DecisionError(
            f"the model was trained on the images of {split}",
            "it is surer of them than of new images, so all its probabilities would be too high",
            f"calibrate on another split, such as {data.eval_split}",
        )
    with start_workers(workers, device_type(device)) as decoders, dataset.open_dataset(data) as there:
        evaluation = evaluate_split(classifier, there, split, console, decoders)
    groups = evaluation.groups.to_resample if evaluation.groups else None
    found = calibrate(evaluation.labels, evaluation.probabilities_NK, split=split, groups=groups)
    folder = find_bundle(run_folder)
    with hold_run(run_folder, print):  # a training would replace the model
        now = read_card(folder)
        refuse_other_weights(folder, now, card.hashes.weights, "the temperature is")
        replace_card(folder, replace(now, temperature=found.temperature, calibration=found.to_json()))
    print(calibration_line(found))
    if evaluation.groups and (line := describe_groups(evaluation.groups.to_json())):
        print(inert(line))
    print(f"written: {folder / 'model.json'}")
    print(inert(write_model_card(run_folder, manifest=there.manifest)))


def calibration_line(found: Calibration) -> str:
    """Return the result in one sentence."""

    def error(value: float, low: float, high: float) -> str:
        return f"{percent(value)} ({percent(low)} to {percent(high)})"

    return (
        f"temperature {found.temperature:.3f}, from {found.num_samples:,} images of {found.split}: expected "
        f"calibration error {error(*found.ece_before)} before, {error(*found.ece_after)} after"
    )


def add_features(
    run_folder: Path, *, shards: str | None = None, batch_size: int | None = None, device: str = "auto"
) -> None:
    """Compute the features and save them in the run's model.

    Raises:
        BundleError: there is no model, or the set is not the one that it was trained on.
    """
    with hold_run(run_folder, print):  # a training that runs is found before the images are read
        classifier = Classifier.load(run_folder, device=device, batch_size=batch_size)
    data = data_of(run_folder, shards)
    with dataset.open_dataset(data) as there:
        manifest = there.manifest
        check_classes(manifest, classifier.card.classes)
        if manifest.sha256 != classifier.card.hashes.manifest:
            raise BundleError(
                f"{manifest.where} (manifest {manifest.sha256[:12]}) is not the shard set that this model was trained "
                f"on ({classifier.card.hashes.manifest[:12]})",
                "its training images would not be those of the model",
                "name the set that the model was trained on with --shards",
            )
        with there.reader(data.train_split) as train, there.reader(data.eval_split) as reference:
            total = min(MOST_TRAINING, train.num_samples) + min(MOST_REFERENCE, reference.num_samples)
            with progress("reading training images", total) as advance:

                def watched(batches: Iterable[Any]) -> Iterator[Any]:
                    for batch in batches:
                        yield batch
                        for _ in range(len(batch.labels_B)):
                            advance()

                features = summarise_training(classifier, train, reference, watched=watched)
    with hold_run(run_folder, print):  # a training would replace the model
        save_features(run_folder, features, weights=classifier.card.hashes.weights)
    home = run_folder / FOLDER_NAME
    print(
        f"features of {features.num_training:,} images of {data.train_split}, compared with "
        f"{features.num_reference:,} of {data.eval_split}; saved in {home if home.is_dir() else run_folder}"
    )
    print(inert(write_model_card(run_folder, manifest=manifest)))
