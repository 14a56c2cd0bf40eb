"""The rooms of the package: imports point down, and what must start fast does not load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "wasteddp"
# From the bottom; a room may import those before it, and itself. settings and errors may be imported by all.
ROOMS = [
    "errors",
    "redaction",
    "settings",
    "data",
    "model",
    "inference",
    "training",
    "report",
    "train",
    "doctor",
    "commands",
    "cli",
]


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wasteddp":
            names = [node.module or ""] if "." in (node.module or "") else [f"wasteddp.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "wasteddp"]
        for name in names:
            if _room(name) not in ("", "__version__"):
                assert ROOMS.index(_room(name)) <= ROOMS.index(room), f"{path} imports {name}"


@pytest.mark.parametrize(
    "module",
    [
        "settings",
        "errors",
        "data.plan",
        "data.forecast",
        "data.coverage",
        "data.draws",
        "data.policies",
        "data.manifest",
        "data.reading",
        "data.shard_set",
        "report.page",
    ],
)
def test_what_needs_no_torch_does_not_import_it(module: str) -> None:
    code = f"import sys, wasteddp.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_is_torch_free_and_names_the_commands() -> None:
    code = "import sys; from wasteddp import cli; print(cli.parser().format_help()); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in (
        "shard",
        "verify",
        "index",
        "draw",
        "plan",
        "evaluate",
        "predict",
        "average",
        "report",
        "doctor",
        "settings",
        "lr-find",
    ):
        assert f"\n    {command} " in done.stdout
