"""W&B as a mirror of metrics.jsonl: never a prompt, never a long wait, never the end of a training.

Its traps, each seen with wandb 0.31: without a key it prompts on a terminal and raises elsewhere; without a network it
waits a minute and a half; tables and artifacts are staged outside the run's folder; a kill loses the last 15 s.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_CONNECT_TIMEOUT_S = 3.0
_INIT_TIMEOUT_S = 20
_FINISH_TIMEOUT_S = 60


class WandbMirror:
    """One W&B run, online where it can be, offline where it cannot.

    Args:
        folder: of the run; what a later `wandb sync` needs stays in it.
        mode: auto, online, offline or disabled. The environment's WANDB_MODE wins over auto.
        project: of the run.
        run_id: of a run to be continued, or ''.
        config: the settings.
        history: rows of metrics.jsonl that W&B may not have.
        say: takes a line for the log.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: str,
        project: str,
        run_id: str,
        config: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self.run_id = run_id or secrets.token_hex(4)
        self._run: Any = None
        self._say = say
        asked = os.environ.get("WANDB_MODE", "") if mode == "auto" else mode
        if asked == "disabled":
            return
        os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb-data").resolve()))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else up to 15 s more at exit
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            mode, why = _choose(asked)
            self._run, mode, why = self._init(mode, why, folder, project, config)
        except Exception as error:  # training goes on without W&B, whatever went wrong there
            say(f"W&B: none ({type(error).__name__}: {error}); metrics.jsonl has every row")
            return
        # An offline run cannot ask what the server has; rows up to the checkpoint lie in the attempts before it.
        self._next = self._run.starting_step if mode == "online" else len(history) and history[-1]["step"] + 1
        for row in history:
            self.log(row["step"], {key: value for key, value in row.items() if key not in ("step", "time_s")})
        sync = f"; send it later with: wandb sync {folder}/wandb/offline-run-*" if mode == "offline" else ""
        say(f"W&B: {mode}, run {self.run_id} ({why}){sync}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The first row of a step wins: what W&B has is not sent twice."""
        if self._run is None or step < self._next:
            return
        self._next = step
        with self._harmless():
            self._run.log(dict(metrics), step=step)

    def finish(self, exit_code: int) -> None:
        if self._run is not None:
            with self._harmless():
                self._run.finish(exit_code=exit_code)

    @contextlib.contextmanager
    def _harmless(self) -> Any:
        try:
            yield
        except Exception as error:
            self._say(f"W&B: {type(error).__name__}: {error}; training goes on, metrics.jsonl has every row")

    def _init(self, mode: str, why: str, folder: Path, project: str, config: Mapping[str, Any]) -> tuple[Any, str, str]:
        import wandb

        settings = wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
            x_transaction_log_flush_interval=1.0,  # 15 s by default: a kill would lose that much
            disable_git=True,
            save_code=False,
            silent=True,
        )
        arguments: dict[str, Any] = {
            "project": project, "id": self.run_id, "dir": str(folder), "config": dict(config), "name": folder.name,
            "resume": "allow", "settings": settings,
        }  # fmt: skip
        try:
            return wandb.init(**arguments | {"mode": mode}), mode, why
        except Exception as error:
            if mode == "offline":
                raise
            wandb.teardown()  # otherwise: "run ID ... is in use"
            reason = (str(error).splitlines() or [""])[0]
            return wandb.init(mode="offline", **arguments), "offline", f"{type(error).__name__}: {reason}"


def _choose(asked: str) -> tuple[str, str]:
    """(mode, reason) without a prompt and within seconds."""
    if asked in ("offline", "dryrun"):
        return "offline", "as set"
    if not _has_credentials():
        return "offline", "no API key: set WANDB_API_KEY or run `wandb login`"
    import wandb

    base_url = str(wandb.setup().settings.base_url)
    if not _reachable(base_url):
        return "offline", f"{base_url} does not answer"
    return "online", "as set" if asked == "online" else "there is a key"


def _has_credentials() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:  # private modules: the same places that wandb.init looks in, without its prompt
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib.wbauth.authenticate import authenticate_session

        base_url = wandb_setup.singleton().settings.base_url
        return authenticate_session(host=base_url, source="wasteddp", prompt=False, update_session=False) is not None
    except Exception:
        return False


def _reachable(url: str) -> bool:
    """A TCP connection, or a proxy that will make one."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY")):
        return True
    parts = urllib.parse.urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), _CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
