"""A run's folder as the report reads it: what is there, and a note on each thing that is not. No torch.

Legend: N logged rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from wasteddp.data.manifest import Manifest
from wasteddp.data.remote.folder import is_url
from wasteddp.errors import RunError, WastedError
from wasteddp.files import read_rows
from wasteddp.inference.bundle import BundleCard, find_bundle, read_card
from wasteddp.inference.evaluation_files import FORMAT as EVALUATION_FORMAT
from wasteddp.report.thinning import F64

_SPLITS_FIRST = ("test", "val")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run. What could not be read is empty or None, and `notes` says why."""

    folder: Path
    name: str
    columns: Mapping[str, F64]  # metric -> [N], NaN in the rows that lack it; also "step" and "time_s"
    settings: Mapping[str, Any]  # dotted key -> value
    environment: Mapping[str, Any]
    card: BundleCard | None
    evaluations: Sequence[Mapping[str, Any]]  # as evaluation_record writes them
    manifest: Manifest | None
    profile: str  # the profiler's verdict
    resumable: bool
    notes: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        return len(self.columns["step"])

    @property
    def last_step(self) -> int:
        return int(self.columns["step"][-1]) if self.num_rows else 0

    @property
    def steps_per_epoch(self) -> float:
        """Steps in an epoch, by the last row that has one; 1 where none has, so that epochs are steps."""
        epochs = self.column("epoch")
        there = np.flatnonzero(epochs > 0)
        return float(self.columns["step"][there[-1]] / epochs[there[-1]]) if there.size else 1.0

    def column(self, name: str) -> F64:
        """[N], all NaN where no row has it."""
        return self.columns.get(name, np.full(self.num_rows, np.nan))

    def logged(self, name: str) -> F64:
        """The finite values of a metric, in their order."""
        values = self.column(name)
        return values[np.isfinite(values)]


def read_run(folder: Path) -> RunRecord:
    """Everything that the report shows of a run.

    Raises:
        RunError: the folder is not there or is no run's.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise RunError(
            f"{folder} has no metrics.jsonl" if folder.is_dir() else f"there is no folder {folder}",
            "there is nothing to report on",
            "name the folder of a run (its run.out)",
        )
    notes: list[str] = []
    damaged: list[str] = []
    columns = _columns(list(read_rows(folder / "metrics.jsonl", "step", damaged=damaged.append)))
    if damaged:
        notes.append(f"{len(damaged)} line(s) of metrics.jsonl are no rows; a kill may have cut the last one")
    settings = _tree(folder / "settings.yaml", notes)
    profile = folder / "profile" / "verdict.txt"
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        columns=columns,
        settings=flat(settings),
        environment=_tree(folder / "environment.json", notes),
        card=_card(folder, notes),
        evaluations=_evaluations(folder, notes),
        manifest=_manifest(settings, notes),
        profile=profile.read_text(encoding="utf-8") if profile.is_file() else "",
        resumable=(folder / "RESUMABLE").exists(),
        notes=tuple(notes),
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"run": {"seed": 0}} -> {"run.seed": 0}"""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, F64]:
    columns = {"step": np.array([row["step"] for row in rows], np.float64)}
    for number, row in enumerate(rows):
        for name, value in row.items():
            if isinstance(value, (int, float)):
                if name not in columns:
                    columns[name] = np.full(len(rows), np.nan)
                columns[name][number] = value
    return columns


def _tree(path: Path, notes: list[str]) -> dict[str, Any]:
    """A YAML or JSON file of named values; {} and a note where there is none."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict):
            return tree
        notes.append(f"{path.name} holds no named values")
    except (OSError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
    return {}


def _card(folder: Path, notes: list[str]) -> BundleCard | None:
    try:
        return read_card(find_bundle(folder))
    except WastedError as error:
        notes.append(error.found)
        return None


def _evaluations(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The evaluations that the run keeps, test first."""
    found = []
    for path in sorted((folder / "evaluations").glob("*/metrics.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] == EVALUATION_FORMAT and record["format_version"] == 1 and "reliability" in record:
                found.append(record)
            else:
                notes.append(f"{path} was written by another version: evaluate again")
        except (OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"{path} cannot be read: {error}")
    order = {name: number for number, name in enumerate(_SPLITS_FIRST)}
    return sorted(found, key=lambda record: (order.get(record["options"]["split"], 9), record["options"]["split"]))


def _manifest(settings: Mapping[str, Any], notes: list[str]) -> Manifest | None:
    try:
        shards = str(settings["data"]["shards"])
        if not is_url(shards):
            return Manifest.load(shards)
        notes.append(
            "the shard set is behind a URL, and a page fetches nothing: no images, nothing on what was left out"
        )
    except (KeyError, TypeError):
        notes.append("settings.yaml does not name the shards (data.shards)")
    except WastedError as error:
        notes.append(
            f"the shard set cannot be read, so neither its images nor what it left out are shown: {error.found}"
        )
    return None
