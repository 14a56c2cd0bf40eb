"""The layers of the package: imports point down, and modules that must start fast do not load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "wasteddp"
# From the bottom: a layer may import itself and the layers before it. A module belongs to the longest name that it
# starts with, so a layer comes after the sublayers that it imports.
LAYERS = [
    "redaction",
    "errors",
    "environment",
    "lock_files",
    "files",
    "settings",
    "parallel",
    "order",
    "data.decoding",
    "data.augmentation",
    "data",  # with data.remote: a dataset may be remote
    "sharding.sources",
    "sharding",
    "model",
    "decisions",
    "inference",
    "trained_model",
    "training_loader",
    "training.distributed.determinism",
    "training.schedule",
    "training.watchdog",
    "training.distributed",
    "training.dataloaders",
    "training.checkpoint.progress",
    "training.lars_lamb",
    "training.objective",
    "training.optimizers",
    "training.checkpoint.reader",
    "training.messages",
    "training.checkpoint",
    "training.tracking",
    "training",
    "report",
    "serve",
    "export",
    "tools",
    "train",
    "commands",
    "cli",
    "__main__",
]
MOST_MODULES = 16  # per folder


def _layer(module: str) -> str:
    """Return the layer of `wasteddp.a.b`; '' for the package itself."""
    name = module.removeprefix("wasteddp").removeprefix(".")
    layers = [layer for layer in LAYERS if f"{name}.".startswith(f"{layer}.")]
    assert layers or name in ("", "__version__"), f"{module} is not in a layer of LAYERS"
    return max(layers, key=len, default="")


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wasteddp":
            for alias in node.names:
                folder = PACKAGE.joinpath(*str(node.module).split(".")[1:])
                is_module = (folder / f"{alias.name}.py").exists() or (folder / alias.name).is_dir()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "wasteddp")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    if path.name == "__init__.py" and path.parent == PACKAGE:
        return
    layer = _layer(".".join(("wasteddp", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"))
    for name in _imported(path):
        if imported := _layer(name):
            assert LAYERS.index(imported) <= LAYERS.index(layer), f"{path} imports {name}"


def test_a_folder_has_at_most_sixteen_modules() -> None:
    for folder in (PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())):
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, f"{folder}: {len(modules)} modules"


@pytest.mark.processes
@pytest.mark.parametrize(
    "module",
    [
        "settings",
        "errors",
        "order.plan",
        "data.train_plan",
        "order.coverage",
        "order.keyed_random",
        "data.augmentation.randaugment",
        "data.manifest",
        "data.reader",
        "data.dataset",
        "report.page",
        "serve.app",
        "serve.server",
        "data.decoding.centre",
        "inference.predict",
        "inference.watch",
        "inference.onnx_classifier",
        "trained_model",
    ],
)
def test_what_needs_no_torch_does_not_import_it(module: str) -> None:
    code = f"import sys, wasteddp.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.processes
def test_help_is_torch_free_and_names_the_commands() -> None:
    code = "import sys; from wasteddp import cli; print(cli.parser().format_help()); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in (
        "shard",
        "verify",
        "compare",
        "index",
        "draw",
        "plan",
        "folds",
        "evaluate",
        "predict",
        "average",
        "export",
        "features",
        "report",
        "review",
        "serve",
        "doctor",
        "settings",
        "lr-find",
    ):
        assert f"\n    {command} " in done.stdout


@pytest.mark.processes
def test_only_what_needs_an_extra_imports_it_at_its_top() -> None:
    code = """
import importlib, pkgutil, sys
import wasteddp
extras = ("fastapi starlette uvicorn python_multipart onnx onnxscript onnxruntime openvino timm tensorboard "
          "pillow_heif s3fs gcsfs boto3 botocore huggingface_hub")
sys.modules.update(dict.fromkeys(extras.split()))  # None: an import raises ImportError
for module in pkgutil.walk_packages(wasteddp.__path__, "wasteddp."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError:
            print(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["wasteddp.serve.app", "wasteddp.serve.connections", "wasteddp.serve.requests"]
