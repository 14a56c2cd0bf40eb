"""Refuses ranks that differ in what each reads from its own disk: settings, code, weights, a checkpoint.

Such a training would run to its end: DDP averages gradients, whatever they are gradients of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from wasteddp import __version__
from wasteddp.errors import LaunchError
from wasteddp.settings import Settings, leaves

# Settings that may differ between machines: they name a place or a number of cores of this machine.
_OF_A_MACHINE = ("run.threads", "data.shards", "data.staged", "data.cache", "data.cache_gb", "data.workers")
_MOST_NAMED = 5


def facts(settings: Settings) -> dict[str, object]:
    """Return the settings by their dotted names, the versions, and a hash of the package's code."""
    found = {key: value for key, value in leaves(settings.model_dump(mode="json")) if key not in _OF_A_MACHINE}
    return {**found, "wasteddp": __version__, "torch": str(torch.__version__), "the code's hash": _hash_of_code()}


def hash_of_facts(facts: Mapping[str, object]) -> str:
    """Return the sha256 of `facts`, for a first comparison of thousands of ranks."""
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def refuse_different(found: Sequence[Mapping[str, object]], remedy: str) -> None:
    """Raise a LaunchError that names what differs from rank 0, and on which rank.

    Args:
        found: of each rank, with the same keys.
        remedy: what to do.
    """
    lines = [
        f"rank {rank}: {name} is {value!r}, on rank 0 {found[0].get(name)!r}"
        for rank, of_rank in enumerate(found)
        for name, value in of_rank.items()
        if value != found[0].get(name)
    ]
    if lines:
        more = f"; and {len(lines) - _MOST_NAMED} more" if len(lines) > _MOST_NAMED else ""
        raise LaunchError(
            "the ranks of this training differ: " + "; ".join(lines[:_MOST_NAMED]) + more,
            "each would compute something else, and the mean of their gradients would be neither",
            remedy,
        )


def hash_of_state(model: nn.Module) -> str:
    """Return the first digits of the sha256 of all parameters and buffers."""
    digest = sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


@cache
def _hash_of_code() -> str:
    package, digest = Path(__file__).parents[2], sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
