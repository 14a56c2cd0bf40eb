"""Read a run's folder for the report, with a note on each thing that is missing. No torch.

Logged rows are also thinned here, to a few points that still show every extreme.

Legend: N logged rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from wasteddp.data.dataset import NO_FOLD, choose_fold
from wasteddp.data.manifest import Manifest
from wasteddp.data.remote.folder import is_url
from wasteddp.errors import RunError, WastedError
from wasteddp.files import read_regular, read_rows
from wasteddp.inference.bundle import BundleCard, find_bundle, read_card
from wasteddp.inference.evaluation_files import read_record
from wasteddp.inference.sorting import read_decisions

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
_SPLITS_FIRST = ("test", "val")


def kept_rows(values: F64, num_buckets: int) -> I64:
    """Return the numbers of the rows to draw: all, or the first, the last, and each bucket's smallest and largest.

    Means would hide a spike, and every n-th row could miss it. Each point that is drawn is a logged row.

    Args:
        values: finite, [N].
        num_buckets: number of buckets of consecutive rows, equal in size; at most 2 * num_buckets + 2 rows are kept.
    """
    if len(values) <= 2 * num_buckets + 2:
        return np.arange(len(values))
    starts = bucket_starts(len(values), num_buckets)
    kept = {0, len(values) - 1}
    for begin, end in zip(starts, [*starts[1:], len(values)], strict=True):
        kept |= {int(begin + values[begin:end].argmin()), int(begin + values[begin:end].argmax())}
    return np.array(sorted(kept))


def bucket_means(values: F64, num_buckets: int) -> F64:
    """Return the mean of each bucket of consecutive rows: [num_buckets], or [N] if there are fewer rows."""
    num_buckets = min(num_buckets, len(values))
    if num_buckets == 0:
        return np.zeros(0)
    starts = bucket_starts(len(values), num_buckets)
    sums: F64 = np.add.reduceat(values, starts)
    return sums / np.diff([*starts, len(values)])


def bucket_starts(num_rows: int, num_buckets: int) -> I64:
    """Return the first row of each of `num_buckets` parts of `num_rows`. Their sizes differ by at most one row."""
    return np.arange(num_buckets) * num_rows // num_buckets


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Return round numbers inside [low, high]: multiples of 1, 2 or 5 times a power of ten, at most `most`."""
    if not high > low:
        return [low]
    power = 10.0 ** np.floor(np.log10((high - low) / most))
    step = next(power * unit for unit in (1, 2, 5, 10, 20, 50) if (high - low) / (power * unit) < most)
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") + 0.0 for number in np.arange(first, last + 1)]  # + 0.0: no "-0"


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most six powers of ten inside [low, high]. If they are few, add 2 and 5 times them, or use `ticks`."""
    exponents = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for units in ((1,), (1, 2, 5)):
        found = [float(f"{unit * 10.0**power:.12g}") for power in exponents for unit in units]
        inside = [value for value in found if low <= value <= high]
        if len(inside) >= 3:
            return inside[:: -(-len(inside) // 6)]
    return ticks(low, high, most=5)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run. Parts that could not be read are empty or None, and `notes` has the reasons."""

    folder: Path
    name: str
    columns: Mapping[str, F64]  # metric -> [N], NaN in rows without it; also "step" and "time_s"
    settings: Mapping[str, Any]  # dotted key -> value
    environment: Mapping[str, Any]
    card: BundleCard | None
    evaluations: Sequence[Mapping[str, Any]]  # as evaluation_files writes them
    decisions: Mapping[str, Mapping[str, Any]]  # of a split, as sorting writes them
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
        """Steps in an epoch, from the last row that has an epoch; 1 if no row has one, so that epochs are steps."""
        epochs = self.column("epoch")
        there = np.flatnonzero(epochs > 0)
        return float(self.columns["step"][there[-1]] / epochs[there[-1]]) if there.size else 1.0

    def column(self, name: str) -> F64:
        """Return a metric: [N], all NaN if no row has it."""
        return self.columns.get(name, np.full(self.num_rows, np.nan))

    def logged(self, name: str) -> F64:
        """Return the finite values of a metric, in order."""
        values = self.column(name)
        return values[np.isfinite(values)]


def read_run(folder: Path) -> RunRecord:
    """Read everything that the report shows of a run.

    Raises:
        RunError: the folder does not exist or is not a run's folder.
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
        notes.append(f"{len(damaged)} line(s) of metrics.jsonl are not rows; a kill may have truncated the last one")
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
        decisions=_decisions(folder, notes),
        manifest=_manifest(settings, notes),
        profile=read_regular(profile).decode(errors="replace") if profile.is_file() else "",
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
    """Read a YAML or JSON file of named values; return {} and add a note if it cannot be read."""
    try:
        tree = yaml.safe_load(read_regular(path).decode("utf-8"))
        if isinstance(tree, dict):
            return tree
        notes.append(f"{path.name} holds no named values")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
    return {}


def _card(folder: Path, notes: list[str]) -> BundleCard | None:
    try:
        return read_card(find_bundle(folder))
    except WastedError as error:
        notes.append(error.found)
        return None


def _evaluations(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the evaluations in the run's folder, test first."""
    found = []
    for path in sorted((folder / "evaluations").glob("*/metrics.json")):
        try:
            found.append(read_record(path))
        except (OSError, ValueError) as error:
            notes.append(f"{path} is not shown: {error}")
    order = {name: number for number, name in enumerate(_SPLITS_FIRST)}
    return sorted(found, key=lambda record: (order.get(record["options"]["split"], 9), record["options"]["split"]))


def _decisions(folder: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted((folder / "evaluations").glob("*/decisions.json")):
        try:
            record = read_decisions(path)
            found[record["split"]] = record
        except (OSError, ValueError) as error:
            notes.append(f"{path} is not shown: {error}")
    return found


def _manifest(settings: Mapping[str, Any], notes: list[str]) -> Manifest | None:
    try:
        shards = str(settings["data"]["shards"])
        if not is_url(shards):
            return choose_fold(Manifest.load(shards), settings["data"].get("fold", NO_FOLD))
        notes.append(
            "the shard set is at a URL, and a report fetches nothing, so its images and those left out are not shown"
        )
    except (KeyError, TypeError):
        notes.append("settings.yaml does not name the shards (data.shards)")
    except WastedError as error:
        notes.append(
            f"the shard set cannot be read, so neither its images nor what it left out are shown: {error.found}"
        )
    return None
