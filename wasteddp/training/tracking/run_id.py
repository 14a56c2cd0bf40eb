"""Under which name a run is tracked, and with which facts: `runs/<name>/tracking.json`.

It is all that W&B is told besides rows, pictures and artifacts, so that `wasteddp sync` needs the run's folder alone.
The id is here and in each checkpoint: here for a run that is killed before its first one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wasteddp import environment
from wasteddp.data.manifest import Manifest
from wasteddp.errors import TrackingError
from wasteddp.files import write_atomically
from wasteddp.redaction import redacted_tree
from wasteddp.settings import Settings

FILE_NAME = "tracking.json"


@dataclass(frozen=True, slots=True)
class Label:
    """What W&B calls the run, and what it is told of it."""

    id: str
    name: str
    project: str
    entity: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]  # settings, hashes, versions
    dataset: Mapping[str, Any]  # of the shard set: name, uri of the manifest, its sha256, samples of each split
    exit_code: int | None = None  # None: it is running, or was killed

    def save(self, folder: Path) -> None:
        write_atomically(folder / FILE_NAME, (json.dumps(asdict(self), indent=1) + "\n").encode())


def load(folder: Path) -> Label:
    """The label of a run's folder.

    Raises:
        TrackingError: there is none, or it is damaged.
    """
    try:
        raw = json.loads((folder / FILE_NAME).read_bytes())
        return Label(**{**raw, "tags": tuple(raw["tags"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrackingError(
            f"{folder / FILE_NAME} cannot be read: {error}",
            "it says which W&B run this training is",
            "name the folder of a run; a training writes the file when it starts",
        ) from error


def of(settings: Settings, manifest: Manifest, *, own: bool, checkpoint_id: str, world_size: int) -> Label:
    """The label of a training that starts.

    A run keeps its id for as long as it is the same training: over kills, by the checkpoint or, before the first one,
    by the folder. A folder that is used again from the beginning with other settings is another training.

    Args:
        own: whether it goes on from a checkpoint of its own folder.
        checkpoint_id: the id in that checkpoint, or ''.
    """
    folder = Path(settings.run.out)
    config = _config(settings, manifest, world_size)
    known = ""
    try:
        stored = load(folder)
        if own or _lineage(stored.config) == _lineage(config):
            known = stored.id
    except TrackingError:
        known = checkpoint_id if own else ""
    splits = {name: split.num_samples for name, split in manifest.splits.items()}
    uri = str(manifest.folder)
    return Label(
        id=known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
        name=folder.name,
        project=settings.track.project,
        entity=settings.track.entity,
        group=settings.track.group,
        job_type=settings.track.job_type,
        tags=settings.track.tags,
        config=config,
        dataset={
            "name": manifest.name,
            "uri": uri if "://" in uri else Path(uri).resolve().as_uri(),
            "manifest": manifest.sha256,
            "classes": list(manifest.classes),
            "samples": splits,
        },
    )


def _lineage(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two starts the same training: all settings but how it is tracked, and the data."""
    kept = {name: config.get(name) for name in Settings.model_fields if name != "track"}
    return kept | {"manifest": config.get("hashes", {}).get("manifest")}


def _config(settings: Settings, manifest: Manifest, world_size: int) -> dict[str, Any]:
    facts = environment.describe()
    config: dict[str, Any] = redacted_tree(settings.model_dump(mode="json"))
    return config | {
        "commit": facts["commit"],
        "hashes": {
            "manifest": manifest.sha256,
            "settings": hashlib.sha256(settings.to_yaml().encode()).hexdigest(),  # as in the model's card
        },
        "processes": world_size,
        "environment": {name: facts[name] for name in ("wasteddp", "python", "platform", "processor", "packages")},
    }
