"""Adds the features of training images to the model of a finished run, see `decisions.unlikeness`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from wasteddp.errors import StoppedError, WastedError
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.feature_files import save_features
from wasteddp.inference.training_features import summarise_training
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.watchdog.exits import STOP


def add_features(run: Path, runtime: Runtime, data: Inputs, say: Callable[[str], None]) -> None:
    """Add the features to the run's model, unless it has them, and report it in a line.

    Rank 0, alone, after the last step: neither the weights nor the order of the run depend on it. A failure is
    reported and does not end the run: `wasteddp features RUN` adds them later.
    """

    def watched(batches: Iterable[Any]) -> Iterator[Any]:
        for batch in runtime.watch.over(iter(batches), "reading features of training images"):
            if STOP:
                raise StoppedError("the run was asked to stop")
            yield batch

    try:
        classifier = Classifier.load(run, device=str(runtime.device))
        if classifier.training:
            return
        features = summarise_training(classifier, data.cache_forecast.train_reader, data.val_reader, watched=watched)
        save_features(run, features, weights=classifier.card.hashes.weights)
    except (WastedError, RuntimeError) as error:  # RuntimeError: torch's, such as too little memory of the GPU
        reason = error.found if isinstance(error, WastedError) else str(error).splitlines()[0]
        say(f"features of training images: not kept, {reason}; add them with: wasteddp features {run}")
        return
    say(
        f"features of {features.num_training:,} training images kept, compared with {features.num_reference:,} of "
        f"{data.val.name}"
    )
