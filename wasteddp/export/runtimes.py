"""Files for other runtimes: ONNX, torch.export and OpenVINO, of one module (`Exported`), and ONNX quantised to int8.

`write_onnx`, `write_torch_export`, `write_openvino` and `quantise` write a file and return its path; each `run_...`
loads a file as another program would.

int8 is static quantisation with training images; what it costs is measured on the set's evaluation split. Activations
of convolutions and linear layers get 8 bits and weights 7, with one scale for each output channel of the weights and
one for each activation, from the activations' ranges on training images.
Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3; onnxruntime.quantization.

Legend: B images, N images of the evaluation split, S side of the view, K classes, D features.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wasteddp.decisions.calibration import calibration_error
from wasteddp.decisions.decide import Policy
from wasteddp.decisions.intervals import bootstrap_interval, draws_for, wilson_interval
from wasteddp.errors import missing_extra
from wasteddp.export.parity import U8, Run
from wasteddp.files import write_atomically
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.onnx_classifier import INPUT, OUTPUTS, OnnxClassifier
from wasteddp.model.networks import head_name

# ORT 1.14 and OpenVINO 2023 read it, and every operator of these networks is in it
OPSET = 18
CALIBRATION_IMAGES = 256
_CARD_FILE = "wasteddp.json"  # in a .pt2: the metadata
_OPERATORS = ["Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"]


class Exported(nn.Module):
    """Normalisation, network and temperature.

    Args:
        card: of the network.
        network: in evaluation mode, on the CPU.
    """

    shift: torch.Tensor
    factor: torch.Tensor

    def __init__(self, card: BundleCard, network: nn.Module) -> None:
        super().__init__()
        self.network, self.temperature = network, card.temperature
        size = card.preprocessing
        # as `decoding.crop.normalise`
        self.register_buffer("shift", torch.tensor([255.0 * m for m in size.mean]).view(1, 3, 1, 1))
        self.register_buffer("factor", torch.tensor([1.0 / (255.0 * s) for s in size.std]).view(1, 3, 1, 1))
        self._features: Any = None
        network.get_submodule(head_name(network)).register_forward_pre_hook(self._keep)
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return probabilities, logits and features of uint8 [B, S, S, 3]: float32 [B, K], [B, K] and [B, D]."""
        pixels_BCHW = (images.permute(0, 3, 1, 2).float() - self.shift) * self.factor
        logits_BK = self.network(pixels_BCHW)
        return (logits_BK / self.temperature).softmax(dim=1), logits_BK, self._features

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._features = inputs[0]


def trace(module: Exported, side_px: int) -> torch.export.ExportedProgram:
    """Return the graph of the module, for any number of images."""
    images = torch.zeros((2, side_px, side_px, 3), dtype=torch.uint8)
    with torch.no_grad():
        return torch.export.export(
            module, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
        )


def write_onnx(module: Exported, side_px: int, path: Path, metadata: dict[str, str]) -> Path:
    """Write an ONNX file with a dynamic batch, with torch's exporter over `torch.export`.

    Raises:
        LaunchError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401, which the exporter imports
    except ImportError as error:
        raise missing_extra("onnx", "exporting to ONNX") from error
    with quiet():
        program = torch.onnx.export(
            trace(module, side_px),
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _name_batch(model)
    set_metadata(model, metadata)
    onnx.checker.check_model(model)
    write_atomically(path, model.SerializeToString())
    return path


def set_metadata(model: Any, metadata: dict[str, str]) -> None:
    """Set the metadata of a parsed ONNX model in place of that which it has."""
    del model.metadata_props[:]
    for name, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value


def run_onnx(path: Path) -> Run:
    classifier = OnnxClassifier(path, batch_size=1)

    def run(images_BHWC: Any) -> Any:
        return classifier.outputs(images_BHWC)[:2]

    return run


def write_torch_export(module: Exported, side_px: int, path: Path, metadata: dict[str, str]) -> Path:
    """Write a .pt2 file with a dynamic batch; `torch.export.load(PATH).module()` runs it."""
    with quiet():
        torch.export.save(trace(module, side_px), path, extra_files={_CARD_FILE: json.dumps(metadata)})
    return path


def run_torch_export(path: Path) -> Run:
    with quiet():
        loaded = torch.export.load(path).module()

    def run(images_BHWC: Any) -> Any:
        with torch.inference_mode():
            return tuple(found.numpy() for found in loaded(torch.from_numpy(images_BHWC))[:2])

    return run


def write_openvino(onnx_path: Path, path: Path, metadata: dict[str, str]) -> Path:
    """Convert an ONNX file to OpenVINO's, PATH.xml and PATH.bin, in fp32.

    Raises:
        LaunchError: openvino is not installed.
    """
    openvino = _openvino()
    model = openvino.Core().read_model(onnx_path)
    for name, value in metadata.items():
        model.set_rt_info(value, ["wasteddp", name.removeprefix("wasteddp.")])
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def run_openvino(path: Path) -> Run:
    # without the hint, a processor with bf16 computes in bf16
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = _openvino().Core().compile_model(path, "CPU", settings)

    def run(images_BHWC: Any) -> Any:
        found = compiled(images_BHWC)
        return found[0], found[1]

    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Do not print the exporters' warnings, which are about themselves."""
    loggers = [logging.getLogger(name) for name in ("", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


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
    return bootstrap_interval(statistic, number, draws=draws_for(number))


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise missing_extra("openvino", "exporting to OpenVINO") from error
    return openvino


def _name_batch(model: Any) -> None:
    """Call the first dimension of input and outputs `batch`; the exporter numbers it."""
    name = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == name:
                dimension.dim_param = "batch"
