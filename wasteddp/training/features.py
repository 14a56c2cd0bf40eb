"""The features of a model's training images, which tell how unlike them another image is, see `decisions.unlikeness`.

One pass over at most `MOST_TRAINING + MOST_REFERENCE` images, as evaluation views. Nothing random is drawn, and no
weight changes. A training adds them to its model at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.data.decoding.crop import EvaluationView
from wasteddp.data.loader import Loader
from wasteddp.data.reader import SplitReader
from wasteddp.decisions.unlikeness import TrainingFeatures
from wasteddp.errors import ShardError, StoppedError, WastedError
from wasteddp.inference.any_classifier import save_features
from wasteddp.inference.classifier import Classifier
from wasteddp.parallel import num_usable_cores
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.watchdog.exits import STOP

I64 = npt.NDArray[np.int64]
Watched = Callable[[Iterable[Any]], Iterable[Any]]

MOST_TRAINING = 1500
MOST_REFERENCE = 500
_MOST_SHARDS = 16  # of a split; a set may have thousands, in a store
_PREFETCH = 2


def keep_features(run: Path, runtime: Runtime, data: Inputs, say: Callable[[str], None]) -> None:
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


def summarise_training(
    classifier: Classifier, train: SplitReader, reference: SplitReader, *, watched: Watched = iter
) -> TrainingFeatures:
    """Return the summary of the features of training images, and the distances of the reference's images to them.

    Args:
        reference: images of the same origin that the model was not trained on, usually val.
        watched: passes on the batches, for progress or to stop.

    Raises:
        ShardError: images cannot be read, or there are too few.
    """
    labels, features_MD = _features(classifier, train, MOST_TRAINING, watched)
    _, reference_ND = _features(classifier, reference, MOST_REFERENCE, watched)
    if len(features_MD) < 2 or len(reference_ND) < 1:
        raise ShardError(
            f"there are {len(features_MD)} training images and {len(reference_ND)} to compare them with",
            "distances to so few images would mean nothing",
            "use a set with more images",
        )
    return TrainingFeatures.fit(features_MD, labels, reference_ND)


def choose_samples(labels_N: npt.NDArray[Any], shards_N: I64, number: int) -> I64:
    """Return at most `number` samples, ascending: evenly spaced in each class, as equally many of each as there are.

    Args:
        labels_N: class of each sample.
        shards_N: shard of each sample; at most 16 evenly spaced shards are used.
    """
    shards = np.unique(shards_N)
    used = shards[np.unique(np.linspace(0, len(shards) - 1, min(_MOST_SHARDS, len(shards))).astype(int))]
    there = np.flatnonzero(np.isin(shards_N, used))
    by_class = sorted((there[labels_N[there] == k] for k in np.unique(labels_N[there])), key=len)
    chosen: list[I64] = []
    for left, samples in zip(range(len(by_class), 0, -1), by_class, strict=True):  # small classes leave room
        share = (number - sum(map(len, chosen))) // left
        places = np.linspace(0, len(samples) - 1, min(share, len(samples))).astype(int)
        chosen.append(samples[places])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def _features(
    classifier: Classifier, reader: SplitReader, number: int, watched: Watched
) -> tuple[I64, npt.NDArray[np.float32]]:
    shards_N, _ = reader.records(np.arange(reader.num_samples))
    samples = choose_samples(reader.labels, shards_N, number)
    size = classifier.card.preprocessing
    loader = Loader(
        reader,
        EvaluationView(size.resize_px),
        image_size_px=size.image_size_px,
        workers=num_usable_cores(),
        prefetch=_PREFETCH,
        replace=True,  # replace undecodable images, as in training
    )
    labels, features = [np.zeros(0, np.int64)], []
    with closing(loader):
        batches = np.split(samples, range(classifier.batch_size, len(samples), classifier.batch_size))
        for batch in watched(loader.batches((0, number, part) for number, part in enumerate(batches))):
            views = list(batch.images_BCHW.permute(0, 2, 3, 1).numpy())
            features.append(classifier.probabilities_and_features(views)[1])
            labels.append(batch.labels_B.numpy())
    return np.concatenate(labels), np.concatenate(features)
