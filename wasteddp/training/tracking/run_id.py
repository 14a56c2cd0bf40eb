"""The identity of a run for trackers, in `runs/<name>/tracking.json`: its id, name, project, settings and data set.

This is everything that W&B receives except rows, images and artifacts, so that `wasteddp sync` needs only the run's
folder. Each checkpoint has the id too. The file keeps it for a run that is killed before its first checkpoint.
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
from wasteddp.files import read_regular, write_atomically
from wasteddp.redaction import redacted_tree
from wasteddp.settings import Settings

FILE_NAME = "tracking.json"


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """The identity of a run on W&B."""

    id: str
    name: str
    project: str
    entity: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]  # settings, hashes, versions
    dataset: Mapping[str, Any]  # the shard set: its name and uri, the manifest's sha256, samples of each split
    exit_code: int | None = None  # None: the run is running or was killed

    def save(self, folder: Path) -> None:
        write_atomically(folder / FILE_NAME, (json.dumps(asdict(self), indent=1) + "\n").encode())


def load(folder: Path) -> RunIdentity:
    """Return the identity in a run's folder.

    Raises:
        TrackingError: the file is missing or damaged.
    """
    try:
        raw = json.loads(read_regular(folder / FILE_NAME))
        return RunIdentity(**{**raw, "tags": tuple(raw["tags"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise TrackingError(
            f"{folder / FILE_NAME} cannot be read: {error}",
            "without it the W&B run of this training is unknown",
            "name the folder of a run; a training writes this file when it starts",
        ) from error


def identify(settings: Settings, manifest: Manifest, *, own: bool, checkpoint_id: str, world_size: int) -> RunIdentity:
    """Return the identity of a training that starts.

    A run keeps its id as long as it is the same training. After a kill the id comes from the checkpoint or, before the
    first checkpoint, from the folder. A start at step 0 in the same folder with other settings is another training.

    Args:
        own: whether the run resumes from a checkpoint of its own folder.
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
    return RunIdentity(
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
    """Return what two starts of the same training have in common: the data and all settings except `track`."""
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
