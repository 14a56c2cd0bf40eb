"""How unlike a model's training images an image is, from the features before its last layer. Pure numpy.

The measure is the squared Mahalanobis distance of the features to the nearest class mean, with one covariance for all
classes (Source: Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
Attacks", eq. 2). docs/decisions.md compares it with others. Only the directions of the largest variances are kept, and
one variance for all others, as in probabilistic principal component analysis (Tipping and Bishop 1999); every variance
is shrunk towards their mean, since there are hardly more images than features.

Users see a percentile: the share of images of the same origin, which the model was not trained on, with a smaller
distance. For images of that origin it is uniform, with mean 50.

Legend: N images, M training images, D features, K classes, R directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, Self

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

UNLIKE_FROM = 95.0  # percentile from which an image is called unlike: 5 % of images of the same origin are
_MOST_DIRECTIONS = 256
_MOST_NUMBERS = 1_100_000  # of means and directions, float32: a file below 5 MB for up to 500 classes
_SHRINKAGE = 0.01
_SMALLEST = 1e-12  # relative to the squared length of the features; a variance of 0 would make distances infinite
_LEAST_REFERENCE = 20  # with fewer, no distance is above 95 % of them without being above all
_SAME_UP_TO, _FAR_FROM = 60.0, 75.0  # mean percentiles of a folder
_SIGMAS = 3.0


@dataclass(frozen=True, slots=True)
class TrainingFeatures:
    """A summary of the features of training images, and the distances of images to compare with."""

    means_KD: npt.NDArray[np.float32]
    directions_RD: npt.NDArray[np.float32]  # orthonormal
    variances_R: F64
    variance_of_rest: float
    reference: F64  # ascending distances of images of the same origin that the model was not trained on
    num_training: int

    @classmethod
    def fit(
        cls, features_MD: npt.NDArray[np.floating[Any]], labels_M: npt.ArrayLike, reference_ND: npt.ArrayLike
    ) -> Self:
        """Summarise the features of M >= 2 training images, and the distances of N >= 1 images of the reference."""
        features, labels = np.asarray(features_MD, np.float64), np.asarray(labels_M)
        classes, numbers = np.unique(labels, return_inverse=True)
        means = np.stack([features[labels == one].mean(axis=0) for one in classes])
        num_images, num_features = features.shape
        _, singular, directions = np.linalg.svd(features - means[numbers], full_matrices=False)
        variances = singular**2 / num_images
        kept = min(_MOST_DIRECTIONS, len(variances), num_features - 1, _MOST_NUMBERS // num_features - len(means))
        kept = max(1, kept)
        mean = max(variances.sum() / num_features, _SMALLEST * (1 + (features**2).sum(axis=1).mean()))
        rest = variances[kept:].sum() / max(1, num_features - kept)
        summary = cls(
            means.astype(np.float32),
            directions[:kept].astype(np.float32),
            (1 - _SHRINKAGE) * variances[:kept] + _SHRINKAGE * mean,
            float((1 - _SHRINKAGE) * rest + _SHRINKAGE * mean),
            np.zeros(0),
            num_images,
        )
        return cls(**{**summary._fields(), "reference": np.sort(summary.distances(np.asarray(reference_ND)))})

    @property
    def num_reference(self) -> int:
        return len(self.reference)

    def distances(self, features_ND: npt.NDArray[np.floating[Any]]) -> F64:
        """Return the squared distance of each image to the nearest class mean: float64 [N]."""
        means, directions = self.means_KD.astype(np.float64), self.directions_RD.astype(np.float64)
        centre = means.mean(axis=0)
        features, means = np.asarray(features_ND, np.float64) - centre, means - centre
        along_NR, along_KR = features @ directions.T, means @ directions.T
        lengths_NK = (features**2).sum(axis=1)[:, None] - 2 * features @ means.T + (means**2).sum(axis=1)
        nearest = np.full(len(features), np.inf)
        for mean_R, length_N in zip(along_KR, lengths_NK.T, strict=True):  # N x K x R numbers may be many
            squares_NR = (along_NR - mean_R) ** 2
            rest_N = (length_N - squares_NR.sum(axis=1)).clip(0)
            nearest = np.minimum(nearest, squares_NR @ (1 / self.variances_R) + rest_N / self.variance_of_rest)
        return nearest

    def percentiles(self, distances_N: F64) -> F64:
        """Return the percentage of the reference's images with a smaller distance, 0 to 100."""
        return 100 * np.searchsorted(self.reference, distances_N) / len(self.reference)

    def verdict_of(self, percentiles_N: F64) -> str:
        """Return `verdict` for these images."""
        return self.verdict(float(percentiles_N.mean()), int((percentiles_N >= UNLIKE_FROM).sum()), len(percentiles_N))

    def verdict(self, mean_percentile: float, num_unlike: int, num_images: int) -> str:
        """Return a sentence on whether images, together, are like the training images.

        The mean percentile of images of the same origin is 50, with a standard deviation of 100 / sqrt(12) for one
        image. It finds what single images do not show: that all of a folder are a little unlike.

        Args:
            mean_percentile: of the images.
            num_unlike: how many have a percentile of `UNLIKE_FROM` or more.
            num_images: at least 1.
        """
        sigma = 100 / sqrt(12) * sqrt(1 / num_images + 1 / self.num_reference)
        found = (
            f"{100 * num_unlike / num_images:.0f} % of these {num_images:,} images are unlike the training images "
            f"(percentile {UNLIKE_FROM:g} or more; {100 - UNLIKE_FROM:.0f} % expected), mean percentile "
            f"{mean_percentile:.0f} (50 expected)"
        )
        if self.num_reference < _LEAST_REFERENCE:
            return (
                f"{found}: not judged, since {self.num_reference} images to compare with do not have a percentile of "
                f"{UNLIKE_FROM:g}; at least {_LEAST_REFERENCE} do"
            )
        if mean_percentile < _SAME_UP_TO:
            return f"{found}: they look like the training images"
        if mean_percentile < 50 + _SIGMAS * sigma:
            return f"{found}: too few images to judge whether they are like the training images"
        how = "far below" if mean_percentile >= _FAR_FROM else "below"
        return f"{found}: expect accuracy {how} the card's"

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the summary as arrays, for a file."""
        return {name: np.ascontiguousarray(value) for name, value in self._fields().items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the summary in the arrays of a file.

        Raises:
            KeyError, ValueError: an array is missing, or they do not belong together.
        """
        summary = cls(
            arrays["means_KD"],
            arrays["directions_RD"],
            arrays["variances_R"],
            float(arrays["variance_of_rest"].item()),
            arrays["reference"],
            int(arrays["num_training"].item()),
        )
        means, directions = summary.means_KD, summary.directions_RD
        is_whole = means.ndim == directions.ndim == 2 and means.shape[1] == directions.shape[1]
        if not (is_whole and summary.variances_R.shape == directions.shape[:1] and summary.reference.ndim == 1):
            raise ValueError("its arrays do not have the shapes of one summary")
        if not (
            means.size and summary.reference.size and (summary.variances_R > 0).all() and summary.variance_of_rest > 0
        ):
            raise ValueError("it has no means or no reference, or a variance that is not above 0")
        return summary

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
