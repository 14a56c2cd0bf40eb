"""Opens a W&B run without a prompt and within bounds.

Its traps, each seen with wandb 0.31: without a key it prompts on a terminal and raises elsewhere; without a network it
waits a minute and a half; tables and artifacts are staged outside the run's folder; a kill loses the last 15 s.
"""

from __future__ import annotations

import os
import socket
import threading
import urllib.parse
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wasteddp.errors import storage
from wasteddp.files import try_lock
from wasteddp.redaction import redacted
from wasteddp.training.tracking.run_id import Label

_ANSWER_TIMEOUT_S = 3.0
_INIT_TIMEOUT_S = 20
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@dataclass(frozen=True, slots=True)
class Mode:
    """online or offline, and why."""

    name: str
    reason: str

    @property
    def is_online(self) -> bool:
        return self.name == "online"


def asked_mode(setting: str) -> str:
    """settings.track.wandb, where WANDB_MODE wins over "auto"."""
    return os.environ.get("WANDB_MODE", "auto") if setting == "auto" else setting


def choose(asked: str) -> Mode:
    """Without a prompt, and within seconds."""
    if asked in ("offline", "dryrun"):
        return Mode("offline", "as set")
    if not _has_key():
        return Mode("offline", "no API key: set WANDB_API_KEY or run `wandb login`")
    import wandb

    base_url = str(wandb.setup().settings.base_url)
    if not _answers(base_url):
        return Mode("offline", f"{redacted(base_url)} does not answer")
    return Mode("online", "as set" if asked == "online" else "there is a key")


def keep_inside(folder: Path) -> None:
    """Before wandb is imported: what it writes stays in the run's folder, and it is quiet."""
    os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb-data").resolve()))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else up to 15 s more at exit
    os.environ.setdefault("WANDB_SILENT", "true")


def open_run(folder: Path, label: Label, mode: Mode, *, finish_s: float, strict: bool = False) -> Any:
    """The W&B run of this training: the one that is there already, or a new one.

    Args:
        finish_s: the longest that its `finish` may take.
        strict: `finish` raises TimeoutError where that was too short.

    Raises:
        Exception: whatever wandb raises. It can be opened again after that, offline too.
    """
    import wandb

    settings = wandb.Settings(
        init_timeout=_INIT_TIMEOUT_S,
        finish_timeout=finish_s,
        finish_timeout_raises=strict,
        x_transaction_log_flush_interval=1.0,  # 15 s by default: a kill would lose that much
        console="off",  # log.txt has it; W&B's copy would double at each resume
        disable_git=True,  # a remote's address may hold a token; the commit is in the config
        save_code=False,
        silent=True,
    )
    try:
        return wandb.init(
            mode=mode.name,  # type: ignore[arg-type]
            id=label.id,
            name=label.name,
            project=label.project,
            entity=label.entity or None,
            group=label.group or None,
            job_type=label.job_type or None,
            tags=label.tags,
            config=dict(label.config),
            dir=str(folder),
            resume="allow",
            settings=settings,
        )
    except Exception:
        wandb.teardown()  # otherwise the next one fails with "run ID ... is in use"
        raise


def sender_lock(folder: Path) -> IO[bytes] | None:
    """The right to send this run's rows, until it is closed or the process ends; None: another process has it.

    Two senders at once would each send what the other had not sent yet, and W&B would have it twice.
    """
    with storage("locking the run's folder", folder):
        file = (folder / ".wandb.lock").open("wb")
    try:
        if try_lock(file.fileno()):
            return file
    except OSError:  # a file system without locks
        pass
    file.close()
    return None


def reason_of(error: Exception) -> str:
    """The first line of it, without secrets."""
    return redacted(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def stop_service() -> None:
    """Kills wandb's process, which the interpreter would otherwise wait for at its exit. What it had is on the disk."""
    with suppress(Exception):  # private: wandb has no public way that does not wait
        from wandb.sdk import wandb_setup

        connection = wandb_setup.singleton()._connection
        connection._proc._process.kill()
        connection._proc._process.wait()  # a killed process is a child until somebody asks for it
        connection._cleanup()  # what waits at the exit


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with suppress(Exception):  # private modules: the same places that wandb.init looks in, without its prompt
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib.wbauth.authenticate import authenticate_session

        base_url = wandb_setup.singleton().settings.base_url
        return authenticate_session(host=base_url, source="wasteddp", prompt=False, update_session=False) is not None
    return False


def _answers(url: str) -> bool:
    """A TCP connection, or a proxy that will make one. In a thread: a resolver without a network has no timeout."""
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
