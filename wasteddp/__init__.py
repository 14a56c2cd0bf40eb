"""Exact, resumable DistributedDataParallel training of waste image classifiers on plain WebDataset tars.

The public names are those of `__all__`, described in docs/python.md; everything else is private. They are imported
when they are first used, so `import wasteddp` takes no time and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wasteddp.data.batch import Batch
    from wasteddp.errors import WastedError
    from wasteddp.trained_model import Answer, Input, Model, load
    from wasteddp.training_loader import TrainingLoader

__version__ = "0.1.0"
__all__ = ["Answer", "Batch", "Input", "Model", "TrainingLoader", "WastedError", "__version__", "load"]

_HOMES = {
    "Answer": "wasteddp.trained_model",
    "Batch": "wasteddp.data.batch",
    "Input": "wasteddp.trained_model",
    "Model": "wasteddp.trained_model",
    "TrainingLoader": "wasteddp.training_loader",
    "WastedError": "wasteddp.errors",
    "load": "wasteddp.trained_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wasteddp' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
