"""Compare measures of how unlike the training images an image is, by AUROC: images of other origin against val.

    python -m launch.bench unlike RUN FOLDER ...      prints a table in Markdown

The features are those of the network's last layer but one, for at most 1,500 training images; the reference is val.
The package keeps one of these measures (`wasteddp.decisions.unlikeness`).

Legend: N images, M training images, D features, K classes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.data import dataset
from wasteddp.data.decoding.decode import ImageHWC, UndecodableError
from wasteddp.data.reader import SplitReader
from wasteddp.decisions.unlikeness import TrainingFeatures
from wasteddp.inference.bundle import load_bundle
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.evaluate import data_of
from wasteddp.inference.predict import find_images
from wasteddp.model.networks import head_of

F64 = npt.NDArray[np.float64]
Distance = Callable[[F64], F64]  # features [N, D] -> [N], larger for images that are less like the training images
MOST_IMAGES = 1500


def mahalanobis(train_MD: F64, labels_M: npt.NDArray[Any], shrinkage: float) -> Distance:
    """Distance to the nearest class mean, with one covariance for all classes. Source: Lee et al. 2018."""
    means_KD = np.stack([train_MD[labels_M == k].mean(0) for k in np.unique(labels_M)])
    centred = train_MD - means_KD[np.searchsorted(np.unique(labels_M), labels_M)]
    whiten = _whitening(centred, shrinkage)
    return lambda x_ND: np.min(_squared(x_ND @ whiten, means_KD @ whiten), axis=1)


def relative_mahalanobis(train_MD: F64, labels_M: npt.NDArray[Any], shrinkage: float) -> Distance:
    """The same less the distance to the mean of all, with the covariance of all. Source: Ren et al. 2021."""
    near = mahalanobis(train_MD, labels_M, shrinkage)
    background = mahalanobis(train_MD, np.zeros_like(labels_M), shrinkage)
    return lambda x_ND: near(x_ND) - background(x_ND)


def neighbours(train_MD: F64, k: int, num: int) -> Distance:
    """Distance of normalised features to the k-th of `num` training images. Source: Sun et al. 2022."""
    kept = _normalised(train_MD[np.random.default_rng(0).permutation(len(train_MD))[:num]])
    return lambda x_ND: np.asarray(np.sort(_squared(_normalised(x_ND), kept), axis=1)[:, k - 1])


def energy(weight_KD: F64, bias_K: F64) -> Distance:
    """Minus the logarithm of the sum of the exponentials of the logits. Source: Liu et al. 2020, T = 1."""
    return lambda x_ND: np.asarray(-np.log(np.exp(x_ND @ weight_KD.T + bias_K).sum(1)))


def doubt(weight_KD: F64, bias_K: F64) -> Distance:
    """1 - the largest probability, the baseline. Source: Hendrycks and Gimpel 2017."""

    def distance(x_ND: F64) -> F64:
        exps = np.exp(x_ND @ weight_KD.T + bias_K)
        return np.asarray(1 - exps.max(1) / exps.sum(1))

    return distance


def auroc(inside: F64, outside: F64) -> float:
    """Return the probability that an image of other origin has a larger distance than one of val; ties count half."""
    order = np.sort(inside)
    below, up_to = np.searchsorted(order, outside), np.searchsorted(order, outside, side="right")
    return float((below + up_to).mean() / 2 / len(inside))


def measures(
    train_MD: F64, labels_M: npt.NDArray[Any], val_ND: F64, weight_KD: F64, bias_K: F64
) -> dict[str, Distance]:
    return {
        "kept": TrainingFeatures.fit(train_MD, labels_M, val_ND).distances,
        "softmax": doubt(weight_KD, bias_K),
        "energy": energy(weight_KD, bias_K),
        **{f"Mahalanobis, shrinkage {s:g}": mahalanobis(train_MD, labels_M, s) for s in (1e-3, 1e-2, 0.1)},
        **{f"relative Mahalanobis, {s:g}": relative_mahalanobis(train_MD, labels_M, s) for s in (1e-3, 1e-2, 0.1)},
        **{
            f"neighbour {k} of {n}": neighbours(train_MD, k, n) for k, n in ((1, 500), (5, 500), (10, 1500), (50, 1500))
        },
    }


def _whitening(centred_MD: F64, shrinkage: float) -> F64:
    values, vectors = np.linalg.eigh(centred_MD.T @ centred_MD / len(centred_MD))
    return np.asarray(vectors / np.sqrt((1 - shrinkage) * values.clip(0) + shrinkage * values.mean()))


def _squared(x_ND: F64, y_MD: F64) -> F64:
    return np.asarray((x_ND**2).sum(1)[:, None] - 2 * x_ND @ y_MD.T + (y_MD**2).sum(1))


def _normalised(x_ND: F64) -> F64:
    return np.asarray(x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True).clip(1e-12))


def _features(classifier: Classifier, views: Iterable[ImageHWC]) -> F64:
    parts = [classifier.probabilities_and_features(batch)[1] for batch in classifier.batches(views)]
    return np.concatenate(parts).astype(np.float64)


def _views(classifier: Classifier, folder: str) -> Iterator[ImageHWC]:
    """Yield the images of a folder. Those that cannot be decoded are named and left out."""
    for path in find_images([folder]):
        try:
            yield classifier.view(Path(path).read_bytes())
        except UndecodableError as error:
            print(f"left out: {path}: {error}", file=sys.stderr)


def _of_split(classifier: Classifier, reader: SplitReader) -> tuple[F64, npt.NDArray[Any]]:
    samples = np.unique(np.linspace(0, reader.num_samples - 1, MOST_IMAGES).astype(int))
    views = (classifier.view(reader.read(int(sample))) for sample in samples)
    return _features(classifier, views), reader.labels[samples]


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("unlike", help="measures of how unlike the training images others are, by AUROC")
    command.add_argument("run_folder", type=Path, metavar="RUN")
    command.add_argument("folders", nargs="+", metavar="FOLDER")
    command.set_defaults(run=compare)


def compare(arguments: argparse.Namespace) -> None:
    """Print the AUROC of each measure for each folder, as a table in Markdown."""
    classifier, run = Classifier.load(arguments.run_folder), arguments.run_folder
    data = data_of(run, None)
    with dataset.open_dataset(data) as shards:
        with shards.reader(data.train_split) as reader:
            train, labels = _of_split(classifier, reader)
        with shards.reader(data.eval_split) as reader:
            val, _ = _of_split(classifier, reader)
    others = {Path(folder).name: _features(classifier, _views(classifier, folder)) for folder in arguments.folders}
    card, state = load_bundle(run)
    head = head_of(card.arch)
    weight, bias = (state[f"{head}.{name}"].numpy().astype(np.float64) for name in ("weight", "bias"))
    print("| measure |", " | ".join(f"{name} ({len(x)})" for name, x in others.items()), "| mean |")
    print("| --- |", " --- |" * (len(others) + 1))
    for name, distance in measures(train, labels, val, weight, bias).items():
        inside = distance(val)
        found = [auroc(inside, distance(x)) for x in others.values()]
        print(f"| {name} |", " | ".join(f"{value:.3f}" for value in found), f"| {np.mean(found):.3f} |")
