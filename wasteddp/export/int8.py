"""int8 ONNX: static quantisation with images of a shard set, and what it costs on the set's evaluation split.

Activations of convolutions and linear layers get 8 bits and weights 7, with one scale for each output channel of the
weights and one for each activation, from the activations' ranges on training images.
Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3; onnxruntime.quantization.

Legend: N images of the evaluation split, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.decisions.calibration import calibration_error
from wasteddp.decisions.decide import Policy
from wasteddp.decisions.intervals import bootstrap_interval, wilson_interval
from wasteddp.errors import missing_extra
from wasteddp.export.parity import U8
from wasteddp.export.runtimes import quiet, set_metadata
from wasteddp.files import write_atomically
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.runtimes.onnx import INPUT

CALIBRATION_IMAGES = 256
_OPERATORS = ["Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"]


def quantise(source: Path, target: Path, views: Iterator[U8], metadata: dict[str, str]) -> Path:
    """Write a quantised copy of an ONNX file.

    Args:
        views: of training images, uint8 [S, S, 3] each.
        metadata: of the new file.

    Raises:
        LaunchError: onnx or onnxruntime is not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise missing_extra("onnx", "quantising") from error

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            view = next(views, None)
            return None if view is None else {INPUT: view[None]}

    with quiet():
        quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # weights of 7 bits: sums of 8 bits overflow on processors without VNNI
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=_OPERATORS,
        )
    model = onnx.load(str(target))
    set_metadata(model, metadata)
    write_atomically(target, model.SerializeToString())
    return target


def card_of_int8(card: BundleCard) -> BundleCard:
    """Return the card for the quantised network.

    It has other weights, so that a policy of the model is refused: its thresholds promise nothing for other
    probabilities. The features have other distances too, so it names no summary of them.
    """
    return replace(card, hashes=replace(card.hashes, weights=f"int8 of {card.hashes.weights}", features=""))


def measure_change(
    labels: npt.ArrayLike,
    before_NK: npt.NDArray[np.float32],
    after_NK: npt.NDArray[np.float32],
    policy: Policy,
) -> dict[str, Any]:
    """Return accuracy, calibration and decisions before and after, and how many changed. Intervals are of 95 %.

    Args:
        labels: true classes, [N].
        before_NK: probabilities of the model; `after_NK`: of the quantised one.
        policy: of the decisions.
    """
    truth = np.asarray(labels, np.int64)
    right = [shares.argmax(axis=1) == truth for shares in (before_NK, after_NK)]
    changed_class = before_NK.argmax(axis=1) != after_NK.argmax(axis=1)
    changed_decision = policy.decide(before_NK).assigned != policy.decide(after_NK).assigned
    gain = right[1].astype(np.float64) - right[0]
    return {
        "images": len(truth),
        "accuracy_before": _share(right[0]),
        "accuracy_after": _share(right[1]),
        "accuracy_change": [float(gain.mean()), *_interval(lambda rows: float(gain[rows].mean()), len(truth))],
        "calibration_error_before": _calibration(before_NK, right[0]),
        "calibration_error_after": _calibration(after_NK, right[1]),
        "changed_classes": _share(changed_class),
        "changed_decisions": _share(changed_decision),
        "largest_probability_change": float(np.abs(before_NK - after_NK).max()),
    }


def _share(which: npt.NDArray[np.bool_]) -> list[float]:
    """Return the share, and its interval."""
    low, high = wilson_interval(int(which.sum()), len(which))
    return [float(which.mean()), low, high]


def _calibration(shares_NK: npt.NDArray[np.float32], right: npt.NDArray[np.bool_]) -> list[float]:
    confidence = shares_NK.max(axis=1).astype(np.float64)
    measure = lambda rows: calibration_error(confidence[rows], right[rows])  # noqa: E731
    return [calibration_error(confidence, right), *_interval(measure, len(right))]


def _interval(statistic: Callable[[Any], float], number: int) -> tuple[float, float]:
    return bootstrap_interval(statistic, number, draws=min(1000, max(100, 10_000_000 // number)))
