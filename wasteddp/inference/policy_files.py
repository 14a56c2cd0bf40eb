"""policy.json: the bins and thresholds that `wasteddp evaluate --bins` chose for a model, and where they were chosen.

A policy belongs to the weights, the temperature and the views (--tta) that it was chosen with. With others it is
refused. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wasteddp.decisions.decide import Policy
from wasteddp.errors import DecisionError
from wasteddp.files import read_regular, write_atomically
from wasteddp.inference.bundle import BundleCard

_FORMAT = "wasteddp-policy"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class ChosenPolicy:
    """A policy, and where its thresholds were chosen."""

    policy: Policy
    chosen_on: str  # a split
    chosen_groups: Mapping[str, Any] | None = None  # of the samples of that split, if they depend on each other
    set_name: str = ""
    set_sha256: str = ""  # of the set's manifest; "": not known, in files of older versions

    def chosen_on_in(self, set_sha256: str) -> str:
        """Return the split, as it is called in an evaluation of this set."""
        is_other = bool(self.set_sha256) and self.set_sha256 != set_sha256
        return f"{self.chosen_on} of {self.set_name}" if is_other else self.chosen_on


def save_policy(path: Path, chosen: ChosenPolicy, card: BundleCard, *, tta: str) -> None:
    """Write a policy, with what it belongs to: the weights, the temperature and the views."""
    content = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "model": made_for(card, tta),
        "chosen_on": chosen.chosen_on,
        "chosen_groups": dict(chosen.chosen_groups) if chosen.chosen_groups else None,
        "set": {"name": chosen.set_name, "sha256": chosen.set_sha256},
        **chosen.policy.to_json(),
    }
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def load_policy(path: Path, card: BundleCard, *, tta: str) -> Policy:
    """Read a policy, see `read_policy`."""
    return read_policy(path, card, tta=tta).policy


def read_policy(path: Path, card: BundleCard, *, tta: str) -> ChosenPolicy:
    """Read a policy of this model with these views.

    Raises:
        DecisionError: the file is not a policy, or another model's.
    """
    try:
        raw = json.loads(read_regular(path))
        if raw["format"] != _FORMAT or raw["format_version"] != _VERSION:
            raise ValueError("its format is another one")
        written_for, policy = dict(raw["model"]), Policy.from_json(raw)
        policy.decide(np.full((1, len(policy.rules.classes)), 0.0))  # its thresholds are numbers, or a TypeError
        groups, of = raw.get("chosen_groups"), raw.get("set", {"name": "", "sha256": ""})
        if groups is not None:
            groups = {"rule": str(groups["rule"]), "num_groups": int(groups["num_groups"])}
        chosen = ChosenPolicy(policy, str(raw["chosen_on"]), groups, str(of["name"]), str(of["sha256"]))
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
    return chosen


def made_for(card: BundleCard, tta: str) -> dict[str, Any]:
    """Return all that changes the probabilities which the thresholds were chosen on."""
    return {"weights": card.hashes.weights, "temperature": card.temperature, "tta": tta}
