"""Sends to W&B what it lacks of a run: rows, images, artifacts and best values. `wasteddp sync RUN` uses it too.

The source is the run's folder. Rows are sent in order with their step, so W&B lacks exactly the rows after the last
step that it has. A row is sent only if its step is later, and never twice. Rows that W&B already has do not change.

`wandb sync` cannot do this for a run that was killed or moved between online and offline: it appends the rows of each
attempt to those of the earlier attempts, including the steps that a kill undid.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasteddp.errors import EXIT_RESUMABLE, TrackingError
from wasteddp.files import read_rows
from wasteddp.inference.bundle import CARD_NAME, FOLDER_NAME, find_bundle, read_card
from wasteddp.training.tracking import pictures as gallery
from wasteddp.training.tracking import wandb_client
from wasteddp.training.tracking.wandb_client import (
    Mode,
    RunIdentity,
    choose,
    keep_inside,
    open_run,
    reason_of,
    sender_lock,
    stop_service,
)

Row = Mapping[str, Any]  # of metrics.jsonl: "step", "time_s" and metrics

# The best value of a metric, which the summary shows in addition to the last value.
BEST = {"val/loss": min, "val/accuracy": max, "val/macro_recall": max, "val/macro_f1": max}
# Media that are sent in addition to METRICS.
MEDIA = {
    "train/augmented": "training images as the network sees them, at the start",
    "val/mistakes": "table of the most confident mistakes of an evaluation, with their images",
    "val/confusion": "confusion matrix of an evaluation",
}


class Delivery:
    """Sends to one open W&B run.

    Args:
        run: the run, as wandb returned it.
        folder: the folder of the training.
        next_step: the first step that W&B does not have.
    """

    def __init__(self, run: Any, folder: Path, identity: RunIdentity, next_step: int) -> None:
        self._run, self._folder, self._identity = run, folder, identity
        self._next, self._best = next_step, dict[str, float]()
        self.num_sent = 0

    def row(self, row: Row) -> None:
        """Send a row with the images up to its step, unless W&B has it."""
        step = row["step"]
        better = self._better(row)
        if step < self._next:
            return
        metrics = {name: value for name, value in row.items() if name not in ("step", "time_s")}
        for path, content in gallery.listed(self._folder, self._next, step):
            metrics |= _media(path, content)
        # commit: otherwise wandb holds the step back until the next one, and a kill would lose it
        self._run.log({**metrics, "_timestamp": row["time_s"]}, step=step, commit=True)
        self._next = step + 1
        self.num_sent += 1
        if better:
            self._run.summary.update({f"best/{name}": value for name, value in self._best.items()})

    def dataset(self) -> None:
        """Register the shard set as an input of the run, by reference: no images are sent."""
        import wandb

        facts = dict(self._identity.dataset)
        artifact = wandb.Artifact(f"shards-{_plain(facts['name'])}", type="dataset", metadata=facts)
        uri = f"{facts['uri']}/manifest.json"
        parts = urllib.parse.urlsplit(uri)
        here = parts.scheme == "file" and Path(urllib.parse.unquote(parts.path)).is_file()
        if not here and parts.scheme not in ("http", "https"):
            uri = f"shards+{uri}"  # an unknown scheme, so that wandb opens neither files nor stores
        # The hash is in the name, so that the same path with other images is another version.
        name = f"manifest-{facts['manifest'][:12]}.json"
        artifact.add_reference(uri, name=name, checksum=False)
        self._run.use_artifact(artifact)

    def model(self) -> None:
        """Send the best model's bundle as an output of the run, if there is one. The same bytes are not sent twice."""
        import wandb

        if not (self._folder / FOLDER_NAME / CARD_NAME).is_file():
            return
        bundle = find_bundle(self._folder)
        card = read_card(bundle)
        metadata = {"step": card.trained.step, "metric": card.trained.metric, "value": card.trained.value}
        metadata |= {"arch": card.arch, "classes": list(card.classes), "weights": card.hashes.weights}
        artifact = wandb.Artifact(f"model-{self._identity.id}", type="model", metadata=metadata)
        for name in card.file_names:
            # no copy for staging or the cache: the file is read from the bundle
            artifact.add_file(str(bundle / name), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["best", f"step-{card.trained.step}"])

    def finish(self, exit_code: int | None) -> None:
        """Wait until W&B has everything, for at most the time limit of `open_run`.

        Args:
            exit_code: that of the training. With None and 75 the run can be resumed, and W&B shows it as preempted.
        """
        if exit_code in (None, EXIT_RESUMABLE):
            self._run.mark_preempting()
        self._run.finish(exit_code=EXIT_RESUMABLE if exit_code is None else exit_code)

    def _better(self, row: Row) -> bool:
        found = False
        for name, best in BEST.items():
            if name in row and (name not in self._best or best(row[name], self._best[name]) != self._best[name]):
                self._best[name] = row[name]
                found = True
        return found


def _media(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return images and confusion matrix as objects of wandb."""
    import wandb

    pictures = content["pictures"]
    if content["kind"] == "augmented":
        images = [wandb.Image(str(folder / one["file"]), caption=one["true"]) for one in pictures]
        return {"train/augmented": images} if images else {}
    columns = ["image", "source", "true", "predicted", "probability"]
    table = wandb.Table(columns=columns)
    for one in pictures:
        table.add_data(wandb.Image(str(folder / one["file"])), *(one[name] for name in columns[1:]))
    fields = ["Actual", "Predicted", "nPredictions"]
    classes = content["classes"]
    counts = [
        [classes[true], classes[predicted], count]
        for true, row in enumerate(content["confusion"])
        for predicted, count in enumerate(row)
    ]
    chart = wandb.plot_table(
        "wandb/confusion_matrix/v1", wandb.Table(columns=fields, data=counts), {name: name for name in fields}
    )
    return {"val/mistakes": table, "val/confusion": chart}


def _plain(name: str) -> str:
    """Replace the characters that W&B does not allow in the name of an artifact."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


@dataclass(frozen=True, slots=True)
class Synced:
    """The result of `sync`."""

    run_id: str
    num_rows: int  # in metrics.jsonl
    num_sent: int
    url: str


def sync(folder: Path, *, timeout_s: float, model: bool = True) -> Synced:
    """Send the rows, images and artifacts that W&B does not have.

    Args:
        folder: the folder of a run, which may still be training offline.
        timeout_s: time limit for sending everything.
        model: whether to send the best model too.

    Raises:
        TrackingError: there is no key, W&B does not answer, the training itself is sending, or the time limit is over.
    """
    identity = wandb_client.load_identity(folder)
    keep_inside(folder)
    mode = choose("online")
    if not mode.is_online:
        raise _failed(folder, mode.reason)
    lock = sender_lock(folder, print)
    if lock is None:
        raise TrackingError(
            f"the training in {folder} is sending its rows itself",
            "rows would be sent twice",
            "wait until the training has ended, and run this command then if rows are missing",
        )
    with lock:
        try:
            return _deliver(folder, identity, mode, timeout_s, model)
        except TimeoutError as error:
            stop_service()
            raise _failed(folder, f"not all data was sent within {timeout_s:g} s") from error
        except Exception as error:  # any error of wandb
            stop_service()  # otherwise the process could not exit before everything is sent
            raise _failed(folder, reason_of(error)) from error


def _deliver(folder: Path, identity: wandb_client.RunIdentity, mode: Mode, timeout_s: float, model: bool) -> Synced:
    run = open_run(folder, identity, mode, finish_s=timeout_s, strict=True)
    delivery = Delivery(run, folder, identity, run.starting_step)
    num_rows = 0
    for row in read_rows(folder / "metrics.jsonl", "step"):
        delivery.row(row)
        num_rows += 1
    url = str(run.url or "")
    try:
        delivery.dataset()
        if model:
            delivery.model()
    finally:  # send the rows even if an artifact fails
        delivery.finish(identity.exit_code)
    for fragment in folder.glob(f"wandb/*run-*-{identity.id}/run-{identity.id}.wandb"):
        # `wandb sync` skips a file with this mark; otherwise it would append the same rows again
        fragment.with_name(f"{fragment.name}.synced").touch()
    return Synced(identity.id, num_rows, delivery.num_sent, url)


def _failed(folder: Path, reason: str) -> TrackingError:
    return TrackingError(
        f"{folder} could not be sent to W&B: {reason}",
        "the dashboard lacks a part of this run; the run's folder is unchanged",
        f"fix the cause, then run: wasteddp sync {folder}",
    )
