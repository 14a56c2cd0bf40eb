"""Load a classifier by the kind of its path: a run's or a bundle's folder, or an ONNX file."""

from __future__ import annotations

from pathlib import Path

from wasteddp.inference.runtimes.classifier import AnyClassifier


def is_onnx(path: str | Path) -> bool:
    return Path(path).suffix == ".onnx" and not Path(path).is_dir()


def load_classifier(
    path: str | Path, *, device: str = "auto", batch_size: int | None = None, tta: str = "none"
) -> AnyClassifier:
    """Load a model. torch is imported only for a folder.

    Raises:
        BundleError, LaunchError: see `Classifier.load` and `OnnxClassifier`.
    """
    if is_onnx(path):
        from wasteddp.inference.runtimes.onnx import OnnxClassifier

        return OnnxClassifier(path, device=device, batch_size=batch_size, tta=tta)
    from wasteddp.inference.classifier import Classifier

    return Classifier.load(path, device=device, batch_size=batch_size, tta=tta)
