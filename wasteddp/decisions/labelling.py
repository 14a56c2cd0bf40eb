"""Which labels are probably wrong, by confident learning, and in which order to label new images. Pure numpy.

The probabilities of labelled images must be held out, from a model that was not trained on the image: a model may have
learned the wrong labels that it was trained on. Of new images, those that teach most come first.

Sources: Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, Journal of
Artificial Intelligence Research 70 (2021), section 3. The margin between the two most probable classes: Scheffer,
Decomain and Wrobel, Active Hidden Markov Models for Information Extraction (2001); compared with entropy: Settles,
Active Learning Literature Survey (2009), section 3.1.

Legend: N images, K classes, M candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
_ROUNDING = 1e-9  # the mean of equal probabilities may be larger than each of them


class LabelErrors(NamedTuple):
    """The images whose label is probably wrong, the most probable error first."""

    images: I64  # [M] row numbers
    classes: I64  # [M] the class that each probably has
    margins: F64  # [M] probability of the label less that of the most probable other class, -1..1, ascending
    joint_KK: I64  # confident joint: number of images by (label, class that is confidently true)
    num_expected: float  # estimated number of wrong labels, from the calibrated joint


def find_label_errors(labels_N: npt.ArrayLike, probabilities_NK: npt.ArrayLike) -> LabelErrors:
    """Find the images that are confidently of another class than their label.

    The threshold of a class is the mean probability of the class among the images with its label. An image is
    confidently of the most probable class among those that reach their thresholds, or of none.

    Args:
        labels_N: integers [N], 0 .. K-1.
        probabilities_NK: finite [N, K], held out.

    Raises:
        ValueError: the shapes do not agree, a label is not a class, or a probability is not finite.
    """
    labels, p = np.asarray(labels_N, np.int64), np.asarray(probabilities_NK, np.float64)
    num_images, num_classes = p.shape
    if labels.shape != (num_images,) or not ((labels >= 0) & (labels < num_classes)).all() or not np.isfinite(p).all():
        raise ValueError(f"{labels.shape} labels in 0 .. {num_classes - 1} and finite {p.shape} probabilities expected")
    rows = np.arange(num_images)
    images_K = np.bincount(labels, minlength=num_classes)
    sums_K = np.bincount(labels, weights=p[rows, labels], minlength=num_classes)
    # No image is confidently of a class that is no image's label.
    thresholds_K = np.divide(sums_K, images_K, out=np.full(num_classes, np.inf), where=images_K > 0)
    reached_NK = p >= thresholds_K - _ROUNDING
    confident_N = np.where(reached_NK, p, -1.0).argmax(axis=1)
    counted_N = reached_NK.any(axis=1)

    joint_KK = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(joint_KK, (labels[counted_N], confident_N[counted_N]), 1)
    # The image of a label with the largest probability of it reaches its threshold, so no used row is empty.
    wrong_K = joint_KK.sum(axis=1) - joint_KK.diagonal()
    num_expected = float((images_K * wrong_K / np.maximum(joint_KK.sum(axis=1), 1)).sum())

    others_NK = p.copy()
    others_NK[rows, labels] = -np.inf
    margins_N = p[rows, labels] - others_NK.max(axis=1) if num_classes > 1 else p[:, 0]
    found = np.flatnonzero(counted_N & (confident_N != labels))
    found = found[np.argsort(margins_N[found], kind="stable")]
    return LabelErrors(found, confident_N[found], margins_N[found], joint_KK, num_expected)


def margin(probabilities_NK: F64) -> F64:
    """Return the difference between the two largest probabilities of each image: [N], 0 (in doubt) .. 1 (sure)."""
    if probabilities_NK.shape[1] < 2:
        return np.ones(len(probabilities_NK))
    two = np.partition(probabilities_NK, -2, axis=1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0])


def entropy(probabilities_NK: F64) -> F64:
    """Return the entropy of each image's probabilities: [N], 0 (sure) .. log K (in doubt), in nats."""
    p = probabilities_NK
    return np.asarray(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(axis=1))


def labelling_order(probabilities_NK: F64, unlike_N: F64 | None = None) -> I64:
    """Return the row numbers [N], the image that is most worth a label first.

    By margin, then by entropy. With `unlike_N`, by the sum of the place in that order and the place by unlikeness.

    Args:
        unlike_N: how unlike the training images each image is; larger: more unlike.
    """
    by_doubt = np.lexsort((-entropy(probabilities_NK), margin(probabilities_NK)))
    if unlike_N is None:
        return by_doubt
    return np.argsort(_places(by_doubt) + _places(np.argsort(-unlike_N, kind="stable")), kind="stable")


def _places(order: I64) -> I64:
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return places
