"""`wasteddp sync RUN`: delivers to W&B exactly what it lacks of a run, from the run's own folder.

`wandb sync` cannot do that for a run that was killed or moved between online and offline: it appends each attempt's
rows to those of the attempts before, with the steps that a kill undid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wasteddp.errors import TrackingError
from wasteddp.files import read_rows
from wasteddp.training.tracking import run_id as labels
from wasteddp.training.tracking.wandb_client import (
    Mode,
    choose,
    keep_inside,
    open_run,
    reason_of,
    sender_lock,
    stop_service,
)
from wasteddp.training.tracking.wandb_delivery import Delivery


@dataclass(frozen=True, slots=True)
class Synced:
    """What became of it."""

    run_id: str
    num_rows: int  # in metrics.jsonl
    num_sent: int
    url: str


def sync(folder: Path, *, timeout_s: float, model: bool = True) -> Synced:
    """Sends the rows, pictures and artifacts that W&B does not have.

    Args:
        folder: of a run, which may still be training offline.
        timeout_s: the longest to wait for W&B to take it all.
        model: whether the best model is sent too.

    Raises:
        TrackingError: no key, no answer, a training that is sending by itself, or not all taken in time.
    """
    label = labels.load(folder)
    keep_inside(folder)
    mode = choose("online")
    if not mode.is_online:
        raise _failed(folder, mode.reason)
    lock = sender_lock(folder)
    if lock is None:
        raise TrackingError(
            f"the training in {folder} is sending its rows itself",
            "rows would be sent twice",
            "wait until it has ended, if anything is missing then",
        )
    with lock:
        try:
            return _deliver(folder, label, mode, timeout_s, model)
        except TimeoutError as error:
            stop_service()
            raise _failed(folder, f"W&B did not take it all within {timeout_s:g} s") from error
        except Exception as error:  # whatever wandb raises
            stop_service()  # it would hold the process for as long as it has something to send
            raise _failed(folder, reason_of(error)) from error


def _deliver(folder: Path, label: labels.Label, mode: Mode, timeout_s: float, model: bool) -> Synced:
    run = open_run(folder, label, mode, finish_s=timeout_s, strict=True)
    delivery = Delivery(run, folder, label, run.starting_step)
    num_rows = 0
    for row in read_rows(folder / "metrics.jsonl", "step"):
        delivery.row(row)
        num_rows += 1
    url = str(run.url or "")
    try:
        delivery.dataset()
        if model:
            delivery.model()
    finally:  # the rows get there even where an artifact does not
        delivery.finish(label.exit_code)
    for fragment in folder.glob(f"wandb/*run-*-{label.id}/run-{label.id}.wandb"):
        # `wandb sync` passes over what has this mark: it would append the same rows again
        fragment.with_name(f"{fragment.name}.synced").touch()
    return Synced(label.id, num_rows, delivery.num_sent, url)


def _failed(folder: Path, reason: str) -> TrackingError:
    return TrackingError(
        f"{folder} could not be sent to W&B: {reason}",
        "the dashboard lacks a part of this run; nothing in the run's folder was changed",
        f"fix it and start it again: wasteddp sync {folder}",
    )
