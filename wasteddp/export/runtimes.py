"""Files for other runtimes: ONNX, torch.export and OpenVINO, all of one module (`Exported`).

Each function writes a file and returns its path; each `run_...` loads it as another program would.

Legend: B images, S side of the view, K classes, D features.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wasteddp.errors import missing_extra
from wasteddp.export.parity import Run
from wasteddp.files import write_atomically
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.runtimes.onnx import INPUT, OUTPUTS, OnnxClassifier
from wasteddp.model.networks import head_name

# ORT 1.14 and OpenVINO 2023 read it, and every operator of these networks is in it
OPSET = 18
_CARD_FILE = "wasteddp.json"  # in a .pt2: the metadata


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
    """Set the metadata of a parsed ONNX model in place of that which it has, and name its producer."""
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
