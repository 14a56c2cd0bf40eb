"""`wasteddp calibrate`: fit the temperature of a run's model on a split, and keep it in the model's card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from wasteddp.data import dataset
from wasteddp.data.decoding.workers import start_workers
from wasteddp.decisions.calibration import Calibration, calibrate
from wasteddp.decisions.intervals import describe_groups
from wasteddp.errors import DecisionError, inert
from wasteddp.files import hold_run
from wasteddp.inference.bundle import find_bundle, load_bundle, read_card, refuse_other_weights, replace_card
from wasteddp.inference.classifier import Classifier, device_type
from wasteddp.inference.evaluate import data_of, evaluate_split
from wasteddp.inference.metrics import percent
from wasteddp.inference.model_card.file import write_model_card


def run(
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
    print(describe(found))
    if evaluation.groups and (line := describe_groups(evaluation.groups.to_json())):
        print(inert(line))
    print(f"written: {folder / 'model.json'}")
    print(inert(write_model_card(run_folder, manifest=there.manifest)))


def describe(found: Calibration) -> str:
    """Return the result in one sentence."""

    def error(value: float, low: float, high: float) -> str:
        return f"{percent(value)} ({percent(low)} to {percent(high)})"

    return (
        f"temperature {found.temperature:.3f}, from {found.num_samples:,} images of {found.split}: expected "
        f"calibration error {error(*found.ece_before)} before, {error(*found.ece_after)} after"
    )
