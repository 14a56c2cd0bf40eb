"""The headline of a benchmark: hardware and versions."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import torch

from wasteddp import environment
from wasteddp.parallel import num_usable_cores

_PACKAGES = ("torch", "torchvision", "accelerate")
_PEERS = ("timm", "webdataset")  # named if they are installed


def headline() -> str:
    """Return one line with processor, cores, GPUs, versions, commit, and the load of the machine."""
    facts = environment.describe()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    versions = [f"{name} {found}" for name in (*_PACKAGES, *_PEERS) if (found := _version(name))]
    parts = [
        f"{facts['processor']}, {num_usable_cores()} cores",
        f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "no GPU",
        f"python {facts['python']}, {', '.join(versions)}",
        f"wasteddp {facts['commit']}",
        f"load {os.getloadavg()[0]:.1f} before the start",
    ]
    return "; ".join(parts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
