"""The identity of a run on W&B, and the client that opens the run there, without a prompt and with time limits.

The identity is in `runs/<name>/tracking.json`: the run's id, name, project, settings and data set. This is everything
that W&B receives except rows, images and artifacts, so that `wasteddp sync` needs only the run's folder. Each
checkpoint has the id too. The file keeps it for a run that is killed before its first checkpoint.

Pitfalls, each seen with wandb 0.31: without a key it prompts on a terminal and raises elsewhere; without a network it
waits for a minute and a half; it stages tables and artifacts outside the run's folder; a kill loses the last 15 s.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from wasteddp import environment
from wasteddp.data.manifest import Manifest
from wasteddp.errors import TrackingError, storage
from wasteddp.files import read_regular, try_lock_or_warn, write_atomically
from wasteddp.redaction import redacted, redacted_tree
from wasteddp.settings import Settings

_IDENTITY_FILE = "tracking.json"
_ANSWER_TIMEOUT_S = 3.0
_INIT_TIMEOUT_S = 20
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


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
        write_atomically(folder / _IDENTITY_FILE, (json.dumps(asdict(self), indent=1) + "\n").encode())


def load_identity(folder: Path) -> RunIdentity:
    """Return the identity in a run's folder.

    Raises:
        TrackingError: the file is missing or damaged.
    """
    try:
        raw = json.loads(read_regular(folder / _IDENTITY_FILE))
        return RunIdentity(**{**raw, "tags": tuple(raw["tags"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise TrackingError(
            f"{folder / _IDENTITY_FILE} cannot be read: {error}",
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
        stored = load_identity(folder)
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


@dataclass(frozen=True, slots=True)
class Mode:
    """Online or offline, and the reason."""

    name: str
    reason: str

    @property
    def is_online(self) -> bool:
        return self.name == "online"


def asked_mode(setting: str) -> str:
    """Return the value of track.wandb; WANDB_MODE replaces "auto"."""
    return os.environ.get("WANDB_MODE", "auto") if setting == "auto" else setting


def choose(asked: str) -> Mode:
    """Choose online or offline, without a prompt and within seconds."""
    if asked in ("offline", "dryrun"):
        return Mode("offline", "as set")
    if not _has_key():
        return Mode("offline", "no API key: set WANDB_API_KEY or run `wandb login`")
    import wandb

    base_url = str(wandb.setup().settings.base_url)
    if not _answers(base_url):
        return Mode("offline", f"{redacted(base_url)} does not answer")
    return Mode("online", "as set" if asked == "online" else "an API key is set")


def keep_inside(folder: Path) -> None:
    """Keep wandb's files in the run's folder and its output silent. Call it before wandb is imported."""
    os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb-data").resolve()))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # otherwise up to 15 s more at exit
    os.environ.setdefault("WANDB_SILENT", "true")


def open_run(folder: Path, identity: RunIdentity, mode: Mode, *, finish_s: float, strict: bool = False) -> Any:
    """Open the W&B run of this training; create it if it does not exist.

    Args:
        finish_s: time limit of the run's `finish`.
        strict: `finish` raises TimeoutError at that limit.

    Raises:
        Exception: any error of wandb. The run can be opened again after it, also offline.
    """
    import wandb

    settings = wandb.Settings(
        init_timeout=_INIT_TIMEOUT_S,
        finish_timeout=finish_s,
        finish_timeout_raises=strict,
        x_transaction_log_flush_interval=1.0,  # the default of 15 s is what a kill would lose
        console="off",  # log.txt has the output; W&B's copy would be duplicated by each resume
        disable_git=True,  # a remote's URL may contain a token; the commit is in the config
        save_code=False,
        silent=True,
    )
    try:
        return wandb.init(
            mode=mode.name,  # type: ignore[arg-type]
            id=identity.id,
            name=identity.name,
            project=identity.project,
            entity=identity.entity or None,
            group=identity.group or None,
            job_type=identity.job_type or None,
            tags=identity.tags,
            config=dict(identity.config),
            dir=str(folder),
            resume="allow",
            settings=settings,
        )
    except Exception:
        wandb.teardown()  # otherwise the next call fails with "run ID ... is in use"
        raise


def sender_lock(folder: Path, say: Callable[[str], None]) -> IO[bytes] | None:
    """Take the lock on sending this run's rows, until the file is closed or the process ends; None: another process
    holds it.

    Two processes that send at the same time would send the same rows, and W&B would have them twice.
    """
    with storage("locking the run's folder", folder):
        file = (folder / ".wandb.lock").open("wb")
    if try_lock_or_warn(file.fileno(), f"W&B: {folder}", say):
        return file
    file.close()
    return None


def reason_of(error: Exception) -> str:
    """Return the first line of an error, without secrets."""
    return redacted(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def stop_service() -> None:
    """Kill wandb's process, for which the interpreter would otherwise wait at its exit. Its data is on disk."""
    with suppress(Exception):  # private: wandb has no public function that does not wait
        from wandb.sdk import wandb_setup

        connection = wandb_setup.singleton()._connection
        connection._proc._process.kill()
        connection._proc._process.wait()  # reap the killed process
        connection._cleanup()  # the handler that would wait at exit


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


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with suppress(Exception):  # private modules: they search where wandb.init does, without its prompt
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib.wbauth.authenticate import authenticate_session

        base_url = wandb_setup.singleton().settings.base_url
        return authenticate_session(host=base_url, source="wasteddp", prompt=False, update_session=False) is not None
    return False


def _answers(url: str) -> bool:
    """Whether a TCP connection can be opened, or a proxy is set. Uses a thread: name resolution has no timeout."""
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    parts = urllib.parse.urlsplit(url)
    answered = threading.Event()

    def connect() -> None:
        with suppress(OSError):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), _ANSWER_TIMEOUT_S).close()
            answered.set()

    attempt = threading.Thread(target=connect, name="wandb-probe", daemon=True)
    attempt.start()
    attempt.join(_ANSWER_TIMEOUT_S)
    return answered.is_set()
