"""The environment of a run: versions, machine, commit; for `environment.json`, the start of the log and the bundle."""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from wasteddp import __version__
from wasteddp.redaction import redacted

_PACKAGES = (
    "torch",
    "torchvision",
    "accelerate",
    "webdataset",
    "wandb",
    "numpy",
    "pillow",
    "simplejpeg",
    "safetensors",
)
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched(name: str, default: int) -> int:
    """Return a number that a launcher sets, such as WORLD_SIZE; the default if it is not set or empty."""
    return int(os.environ.get(name) or default)


def prepare() -> None:
    """Let a program start with any terminal and any launcher.

    `print` writes what the terminal's encoding lacks, such as letters of a file name, as an escape. A launcher's
    variable that is empty counts as not set, for torch and Accelerate too.
    """
    for name in _LAUNCHER:
        if os.environ.get(name) == "":
            del os.environ[name]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def describe() -> dict[str, Any]:
    """Return the environment as plain values, without host name, user or paths: run folders are shared."""
    return {
        "wasteddp": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": [Path(sys.argv[0]).name, *map(redacted, sys.argv[1:])],
    }


@cache
def commit() -> str:
    """Return the checkout's commit at the first call, with a + if tracked files differ from it.

    Without a checkout it is the version.
    """
    root = Path(__file__).resolve().parents[1]
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return f"v{__version__}"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
