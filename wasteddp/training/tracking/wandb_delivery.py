"""Brings a W&B run to what a run's folder holds: rows, pictures, artifacts, best values.

The folder is the truth. Rows go in order and carry their step, so what W&B lacks is always what is after the last step
that it has: a row is sent if its step is after that, and never twice. What W&B has stays as it was sent first.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wasteddp.errors import EXIT_RESUMABLE
from wasteddp.inference.bundle import CARD_NAME, FOLDER_NAME, find_bundle, read_card
from wasteddp.training.tracking import pictures as gallery
from wasteddp.training.tracking.run_id import Label

Row = Mapping[str, Any]  # of metrics.jsonl: "step", "time_s" and metrics

# Which value of a metric is its best: the summary shows it beside the last one.
BEST = {"val/loss": min, "val/accuracy": max, "val/macro_recall": max, "val/macro_f1": max}
# What is sent beside the rows' numbers, as METRICS has those.
MEDIA = {
    "train/augmented": "training images as the network sees them, at the start",
    "val/mistakes": "table of the surest mistakes of an evaluation, with their images",
    "val/confusion": "confusion matrix of an evaluation",
}


class Delivery:
    """Sends to one open W&B run.

    Args:
        run: of wandb.
        folder: of the training.
        next_step: the first step that W&B does not have.
    """

    def __init__(self, run: Any, folder: Path, label: Label, next_step: int) -> None:
        self._run, self._folder, self._label = run, folder, label
        self._next, self._best = next_step, dict[str, float]()
        self.num_sent = 0

    def row(self, row: Row) -> None:
        """Sends it with the pictures that belong to it, unless W&B has it."""
        step = row["step"]
        better = self._better(row)
        if step < self._next:
            return
        metrics = {name: value for name, value in row.items() if name not in ("step", "time_s")}
        for path, content in gallery.listed(self._folder, self._next, step):
            metrics |= _media(path, content)
        # commit: a step that is not committed waits for the next one, and a kill would lose it
        self._run.log({**metrics, "_timestamp": row["time_s"]}, step=step, commit=True)
        self._next = step + 1
        self.num_sent += 1
        if better:
            self._run.summary.update({f"best/{name}": value for name, value in self._best.items()})

    def dataset(self) -> None:
        """The shard set as an input of the run, by reference: no image is sent."""
        import wandb

        facts = dict(self._label.dataset)
        artifact = wandb.Artifact(f"shards-{_plain(facts['name'])}", type="dataset", metadata=facts)
        uri = f"{facts['uri']}/manifest.json"
        parts = urllib.parse.urlsplit(uri)
        here = parts.scheme == "file" and Path(urllib.parse.unquote(parts.path)).is_file()
        if not here and parts.scheme not in ("http", "https"):
            uri = f"shards+{uri}"  # a scheme that wandb does not know: it then opens neither files nor stores
        # The hash is in the name: the same path with other images is then another version.
        name = f"manifest-{facts['manifest'][:12]}.json"
        artifact.add_reference(uri, name=name, checksum=False)
        self._run.use_artifact(artifact)

    def model(self) -> None:
        """The best model's bundle as an output of the run, if there is one. The same bytes are not sent twice."""
        import wandb

        if not (self._folder / FOLDER_NAME / CARD_NAME).is_file():
            return
        bundle = find_bundle(self._folder)
        card = read_card(bundle)
        metadata = {"step": card.trained.step, "metric": card.trained.metric, "value": card.trained.value}
        metadata |= {"arch": card.arch, "classes": list(card.classes), "weights": card.hashes.weights}
        artifact = wandb.Artifact(f"model-{self._label.id}", type="model", metadata=metadata)
        for path in (bundle / CARD_NAME, bundle / card.weights_name):
            # neither a copy for staging nor one for the cache: the bundle stays where it is
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["best", f"step-{card.trained.step}"])

    def finish(self, exit_code: int | None) -> None:
        """Waits until all is there, or for as long as the run was opened with.

        Args:
            exit_code: of the training; None and 75: it can go on, and W&B shows it as preempted.
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
    """Pictures and confusion matrix as wandb's objects."""
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
    """What W&B allows in an artifact's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
