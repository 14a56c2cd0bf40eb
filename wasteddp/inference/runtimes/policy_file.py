"""policy.json: the bins and thresholds that `wasteddp evaluate --bins` chose for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from wasteddp.decisions.decide import Policy
from wasteddp.errors import DecisionError
from wasteddp.files import read_regular, write_atomically
from wasteddp.inference.bundle import BundleCard

FORMAT = "wasteddp-policy"
FORMAT_VERSION = 1


def save_policy(path: Path, policy: Policy, card: BundleCard, *, tta: str, chosen_on: str) -> None:
    """Write the bins and thresholds, with what they belong to: the weights, the temperature and the views."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": made_for(card, tta),
        "chosen_on": chosen_on,
        **policy.to_json(),
    }
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def load_policy(path: Path, card: BundleCard, *, tta: str) -> Policy:
    """Read a policy of this model with these views.

    Raises:
        DecisionError: the file is not a policy, or another model's.
    """
    try:
        raw = json.loads(read_regular(path))
        if raw["format"] != FORMAT or raw["format_version"] != FORMAT_VERSION:
            raise ValueError("its format is another one")
        written_for, policy = dict(raw["model"]), Policy.from_json(raw)
        policy.decide(np.full((1, len(policy.rules.classes)), 0.0))  # its thresholds are numbers, or a TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as failure:
        raise DecisionError(
            f"{path} is not a policy of wasteddp: {failure}",
            "items would go into wrong bins, or nowhere",
            "write it with: wasteddp evaluate RUN --bins FILE",
        ) from failure
    now = made_for(card, tta)
    if written_for != now or policy.rules.classes != card.classes:
        others = {name: value for name, value in now.items() if written_for.get(name) != value}
        differs = [f"{name} {written_for.get(name)!r} instead of {value!r}" for name, value in others.items()]
        raise DecisionError(
            f"{path} was made for another model: {', '.join(differs) or 'other classes'}",
            "its thresholds promise nothing for these probabilities",
            "write it again with: wasteddp evaluate RUN --bins FILE, and the same --tta as here",
        )
    return policy


def made_for(card: BundleCard, tta: str) -> dict[str, Any]:
    """Return all that changes the probabilities which the thresholds were chosen on."""
    return {"weights": card.hashes.weights, "temperature": card.temperature, "tta": tta}
