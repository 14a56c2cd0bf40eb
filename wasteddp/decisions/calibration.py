"""Temperature scaling: logits are divided by one number that makes the probabilities of a split as likely as possible.

Legend: N samples, K classes.

Source: Guo et al. 2017 (arXiv:1706.04599).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, exp
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.decisions.intervals import F64, bootstrap_interval, draws_for
from wasteddp.errors import DecisionError

NUM_BINS = 10  # of confidence, as in inference.metrics
MAX_STANDARD_ERROR = 0.15  # of log(temperature): 15 % of the temperature
_LOG_RANGE = 4.0  # temperatures of 1/55 to 55
_TINY = 1e-30  # a float32 softmax gives 0 below it
_STEPS = 60  # of a bisection


@dataclass(frozen=True, slots=True)
class Calibration:
    """A fitted temperature, and what it changed on the split that it was fitted on. Errors have a 95 % interval."""

    temperature: float
    split: str
    num_samples: int
    nll_before: float  # mean negative log-likelihood, in nats
    nll_after: float
    ece_before: tuple[float, float, float]  # expected calibration error: value, low, high
    ece_after: tuple[float, float, float]
    num_groups: int = 0  # that the intervals are over; 0: over images

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Calibration:
        """Raises: KeyError, TypeError, ValueError."""
        errors = {name: tuple(float(value) for value in raw[name]) for name in ("ece_before", "ece_after")}
        return cls(**{**raw, **errors})


def scaled(probabilities_NK: npt.ArrayLike, temperature: float) -> F64:
    """Return softmax(log(p) / temperature) of each row: the probabilities at another temperature."""
    logits_NK = _logits(probabilities_NK) / temperature
    logits_NK -= logits_NK.max(axis=1, keepdims=True)
    shares_NK = np.exp(logits_NK)
    return np.asarray(shares_NK / shares_NK.sum(axis=1, keepdims=True))


def fit_temperature(
    labels: npt.ArrayLike, probabilities_NK: npt.ArrayLike, groups: npt.ArrayLike | None = None
) -> float:
    """Return the temperature of the smallest mean negative log-likelihood.

    The loss is convex in 1/T, so the zero of its derivative is found by bisection.

    Args:
        labels: int [N].
        probabilities_NK: at temperature 1.
        groups: [N], whose images resemble each other; None: all are independent.

    Raises:
        DecisionError: the images are too few, or the loss has no minimum in the range: all of them are right, or
            whether they are does not go with the confidence.
    """
    logits_NK, truth = _logits(probabilities_NK), np.asarray(labels, np.int64)
    rows = np.arange(len(truth))
    if not len(truth) or (logits_NK.argmax(axis=1) == truth).all():
        raise _too_few(f"all {len(truth)} images are classified correctly" if len(truth) else "there are no images", 0)
    low, high = -_LOG_RANGE, _LOG_RANGE  # of log(1/T)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        slope, _ = _slopes(logits_NK, truth, rows, exp(middle))
        low, high = (middle, high) if slope.mean() < 0 else (low, middle)
    if abs(low) > _LOG_RANGE - 1e-6:
        raise _out_of_range(1.0 / exp(low), len(truth))
    scale = exp((low + high) / 2)
    slope, curvature = _slopes(logits_NK, truth, rows, scale)
    if (error := _standard_error(slope * scale, curvature * scale**2, groups)) > MAX_STANDARD_ERROR:
        needed = ceil(len(truth) * (error / MAX_STANDARD_ERROR) ** 2) if np.isfinite(error) else 0
        raise _too_few(f"{len(truth)} images fix the temperature to {100 * error:.0f} % only", needed)
    return 1.0 / scale


def calibrate(
    labels: npt.ArrayLike, probabilities_NK: npt.ArrayLike, *, split: str, groups: npt.ArrayLike | None = None
) -> Calibration:
    """Fit the temperature and measure the calibration before and after.

    Args:
        probabilities_NK: at temperature 1.
        groups: [N], at least two different ones, for intervals over groups.

    Raises:
        DecisionError: see `fit_temperature`.
    """
    temperature = fit_temperature(labels, probabilities_NK, groups)
    before, after = scaled(probabilities_NK, 1.0), scaled(probabilities_NK, temperature)
    truth = np.asarray(labels, np.int64)
    return Calibration(
        temperature=temperature,
        split=split,
        num_samples=len(truth),
        nll_before=_nll(truth, before),
        nll_after=_nll(truth, after),
        ece_before=_with_interval(truth, before, groups),
        ece_after=_with_interval(truth, after, groups),
        num_groups=0 if groups is None else len(np.unique(groups)),
    )


def calibration_error(confidence: F64, is_right: npt.NDArray[np.bool_]) -> float:
    """Return the expected calibration error: the mean distance of accuracy and confidence over `NUM_BINS` equal bins.

    Source: Guo et al. 2017, eq. 3. NaN without samples.
    """
    if not len(confidence):
        return float("nan")
    bins = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=confidence - is_right, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _with_interval(
    truth: npt.NDArray[np.int64], shares_NK: F64, groups: npt.ArrayLike | None
) -> tuple[float, float, float]:
    """Return the calibration error, and its interval by the basic bootstrap: reflected at the value.

    The error is a sum of distances, so chance makes it larger, and resampling makes it larger again. The percentile
    interval would lie above the true error of a calibrated model, in all of 120 simulations.

    Source: Davison and Hinkley 1997, Bootstrap Methods and their Application, section 5.2.
    """
    confidence, is_right = shares_NK.max(axis=1), shares_NK.argmax(axis=1) == truth
    low, high = bootstrap_interval(
        lambda rows: calibration_error(confidence[rows], is_right[rows]),
        len(truth),
        groups=groups,
        draws=draws_for(len(truth)),
    )
    value = calibration_error(confidence, is_right)
    return value, min(value, max(0.0, 2 * value - high)), max(value, min(1.0, 2 * value - low))


def _logits(probabilities_NK: npt.ArrayLike) -> F64:
    return np.log(np.maximum(np.asarray(probabilities_NK, np.float64), _TINY))


def _nll(truth: npt.NDArray[np.int64], shares_NK: F64) -> float:
    return float(-np.log(np.maximum(shares_NK[np.arange(len(truth)), truth], _TINY)).mean())


def _slopes(logits_NK: F64, truth: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], scale: float) -> tuple[F64, F64]:
    """Return the first and second derivative of each sample's loss by 1/T: [N] each."""
    scaled_NK = logits_NK * scale
    shares_NK = np.exp(scaled_NK - scaled_NK.max(axis=1, keepdims=True))
    shares_NK /= shares_NK.sum(axis=1, keepdims=True)
    mean = (shares_NK * logits_NK).sum(axis=1)
    return mean - logits_NK[rows, truth], (shares_NK * logits_NK**2).sum(axis=1) - mean**2


def _standard_error(slope: F64, curvature: F64, groups: npt.ArrayLike | None) -> float:
    """Return the standard error of log(T) at the minimum, robust to a wrong model (Huber 1967, White 1982).

    With groups, their sums are independent and the images are not (Liang and Zeger 1986, Biometrika 73:13).
    """
    if not curvature.mean() > 0:
        return float("inf")
    if groups is not None:
        _, number = np.unique(np.asarray(groups), return_inverse=True)
        slope = np.asarray(np.bincount(number, weights=slope), np.float64)
    return float(np.sqrt((slope**2).sum()) / curvature.sum())


def _out_of_range(temperature: float, number: int) -> DecisionError:
    if temperature > 1:
        return DecisionError(
            f"on {number} images, the model's confidence has nothing to do with being right",
            "no temperature makes it honest, so the probabilities stay as the network gives them",
            "calibrate on more images; else train the model further, and check that the images have its classes",
        )
    return DecisionError(
        f"on {number} images, the best temperature is below {temperature:.2g}: the model is right far more often than "
        "it is sure",
        "the temperature could be far from the right one, so the probabilities stay as the network gives them",
        "calibrate on more images; else train the model further, with less label smoothing or mixup",
    )


def _too_few(found: str, needed: int) -> DecisionError:
    return DecisionError(
        f"{found}: too few to calibrate the probabilities",
        "the temperature could be far from the right one, so the probabilities stay as the network gives them",
        f"about {needed:,} images would do: add images to the split" if needed else "use a split with more images",
    )
