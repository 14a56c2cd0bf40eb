"""In which order to label new images: those that teach most first. Pure numpy.

Source: the margin between the two most probable classes: Scheffer, Decomain and Wrobel, Active Hidden Markov Models for
Information Extraction (2001); compared with entropy: Settles, Active Learning Literature Survey (2009), section 3.1.

Legend: N images, K classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


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
