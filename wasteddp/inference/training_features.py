"""Compute the features of a model's training images, which tell how unlike them another image is.

One pass over at most `MOST_TRAINING + MOST_REFERENCE` images, as evaluation views. Nothing random is drawn, and no
weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.data.decoding.crop import EvaluationView
from wasteddp.data.loader import Loader
from wasteddp.data.reader import SplitReader
from wasteddp.decisions.unlikeness import TrainingFeatures
from wasteddp.errors import ShardError
from wasteddp.inference.classifier import Classifier
from wasteddp.parallel import num_usable_cores

MOST_TRAINING = 1500
MOST_REFERENCE = 500
_MOST_SHARDS = 16  # of a split; a set may have thousands, in a store
_PREFETCH = 2

I64 = npt.NDArray[np.int64]
Watched = Callable[[Iterable[Any]], Iterable[Any]]


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
