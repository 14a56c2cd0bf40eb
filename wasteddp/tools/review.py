"""`wasteddp review`: find the labels that a person should look at, and write a page on which to decide.

The parts of the page:

    labels that are probably wrong           confident learning on held-out probabilities
    near-duplicates with different labels    pairs of perceptual hashes, in all splits of the set
    images without a label to label next     those in most doubt, and most unlike the training images

Legend: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from wasteddp.data import dataset
from wasteddp.data.dataset import ShardSet
from wasteddp.data.decoding.decode import UndecodableError
from wasteddp.data.decoding.workers import Workers, start_workers
from wasteddp.decisions.labelling import F64, find_label_errors, labelling_order
from wasteddp.errors import RunError, WastedError, inert
from wasteddp.files import read_regular, write_atomically
from wasteddp.inference.bundle import find_bundle, read_card
from wasteddp.inference.classifier import Classifier, device_type
from wasteddp.inference.evaluate import check_classes, data_of, evaluate_split
from wasteddp.inference.evaluation_files import read_record
from wasteddp.inference.metrics import percent
from wasteddp.inference.predict import find_images, predict
from wasteddp.inference.prediction_files import Failure, SavedPredictions, read_predictions
from wasteddp.parallel import num_usable_cores
from wasteddp.report.evaluations import data_url
from wasteddp.report.page import PICTURE_QUALITY, PICTURE_SIDE_PX, Part, Picture, render_review
from wasteddp.tools.review_images import SetImage, SetImages, written

_HELD_OUT = ("val", "test")
_TOP = 3

Warn = Callable[[str], None]


def review_run(
    run_folder: Path,
    *,
    split: Sequence[str] = (),
    predictions: Sequence[Path] = (),
    unlabelled: str = "",
    out: Path | None = None,
    limit: int = 400,
    pairs: bool = True,
    shards: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    workers: int | str = 0,
) -> Path:
    """Write the page, print what it holds, and return its path.

    Args:
        split: names of splits; empty: those of val and test that the set has.
        predictions: files of `wasteddp evaluate`, used instead of `split`.
        unlabelled: an image, a folder or a glob of images, or a CSV of `wasteddp predict`; empty: none.
        out: the page; None: RUN/review.html.
        limit: most pictures on the page.
        pairs: look for near-duplicates, which decodes every image of the set.
        shards: folder or URL of the set; None: the one that the model was trained on.

    Raises:
        RunError: the predictions are not of this set, or there are none.
    """
    console = Console(soft_wrap=True, markup=False, highlight=False)
    warnings: list[str] = []

    def warn(text: str) -> None:
        text = inert(written(text))
        warnings.append(text)
        console.print(f"warning: {text}", style="yellow")

    model = _Model(run_folder, batch_size, device, workers)
    with ExitStack() as stack:
        shard_set = stack.enter_context(dataset.open_dataset(data_of(run_folder, shards)))
        images = SetImages(shard_set, stack)
        classes = images.manifest.classes
        if predictions:
            given = [read_predictions(path, classes) for path in predictions]
        else:
            given = [_of_split(model, shard_set, name, console) for name in _splits(images, split, warn)]
        labelled = Labelled.of(given, images, warn)
        parts = [_label_errors(labelled, classes, limit)]
        if pairs:
            parts.append(_conflicting_pairs(labelled, images, limit, warn))
        if unlabelled:
            parts.append(_label_next(_predictions_of(model, unlabelled, classes, warn), classes, limit))
        lead = f"{len(labelled.images):,} predictions of {', '.join(labelled.splits)}."
        shown = _illustrate(fit(parts, limit), images, warn)
    page = render_review(run_folder.resolve().name, lead, warnings, shown, classes, store=images.manifest.sha256[:16])
    path = out or run_folder / "review.html"
    write_atomically(path, page.encode("utf-8", "replace"))
    console.print(lead)
    for part in shown:
        rest = "" if len(part.cards) == part.num_found else f", the first {len(part.cards):,} on the page"
        console.print(f"{part.title}: {part.num_found:,}{rest}. {part.note}".rstrip())
    num_pictures = sum(len(card) for part in shown for card in part.cards)
    console.print(f"{path}: {num_pictures:,} pictures, {len(page) / 1e6:.1f} MB, opens in any browser")
    return path


@dataclass(frozen=True, slots=True)
class Labelled:
    """Predictions of images of the set. N images, K classes."""

    images: tuple[SetImage, ...]  # [N]
    probabilities_NK: F64

    @classmethod
    def of(cls, given: Sequence[SavedPredictions], images: SetImages, warn: Warn) -> Labelled:
        """Find the images that files of predictions name.

        Raises:
            RunError: a file has no labels or other labels than the set, an image is there twice, or no image is found.
        """
        found: dict[str, SetImage] = {}
        rows, missing = [], []
        for one in given:
            if one.labels is None:
                raise _refusal("the predictions have no column `true`; those of `predict` go to --unlabelled")
            for path, label, row in zip(one.paths, one.labels.tolist(), one.probabilities_NK, strict=True):
                image = images.find(path)
                if image is None:
                    missing.append(path)
                    continue
                if image.label != label:
                    classes = images.manifest.classes
                    raise _refusal(
                        f"{path} is {classes[image.label]} in {images.manifest.where}, and was {classes[label]} when "
                        "it was evaluated"
                    )
                if image.path in found:
                    raise _refusal(f"{path} has several predictions")
                found[image.path] = image
                rows.append(row)
        if not found:
            raise _refusal(f"none of the {len(missing):,} predictions is of an image of {images.manifest.where}")
        if missing:
            warn(f"{len(missing):,} prediction(s) are of images that the set does not have, such as {missing[0]}")
        return cls(tuple(found.values()), np.array(rows))

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(image.split for image in self.images))


def _refusal(found: str) -> RunError:
    return RunError(
        found,
        "labels would be compared with probabilities of other images or other labels",
        "evaluate the run again on the set as it is now (wasteddp evaluate), and give each prediction once",
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """The run's model, which is loaded only if something must be computed."""

    run_folder: Path
    batch_size: int | None
    device: str
    workers: int | str

    def load(self) -> Classifier:
        return Classifier.load(self.run_folder, device=self.device, batch_size=self.batch_size)

    def decoders(self) -> AbstractContextManager[Workers]:
        return start_workers(self.workers, device_type(self.device))


def _splits(images: SetImages, asked: Sequence[str], warn: Warn) -> list[str]:
    """Return the splits to review, and warn of those that the model was trained on."""
    splits = list(dict.fromkeys(asked or [name for name in _HELD_OUT if name in images.splits] or _HELD_OUT))
    for name in splits:
        images.manifest.split(name)
        if name not in _HELD_OUT:
            warn(
                f"the probabilities of {name} are not held out: a model that was trained on these images may have "
                "learned their wrong labels. `wasteddp folds` gives probabilities of models that were not"
            )
    return splits


def _of_split(model: _Model, shard_set: ShardSet, split: str, console: Console) -> SavedPredictions:
    """Return the predictions in the run's folder, if they are of this model and set; else compute them."""
    manifest = shard_set.manifest
    check_classes(manifest, read_card(find_bundle(model.run_folder)).classes)
    folder = model.run_folder / "evaluations" / split
    if _is_current(folder, model.run_folder, manifest.sha256):
        return read_predictions(folder / "predictions.csv", manifest.classes)
    with model.decoders() as workers:
        done = evaluate_split(model.load(), shard_set, split, console, workers)
    return SavedPredictions(
        tuple(map(written, done.sources)), done.probabilities_NK.astype(np.float64), done.labels.astype(np.int64)
    )


def _is_current(folder: Path, run_folder: Path, manifest_sha256: str) -> bool:
    try:
        record = read_record(folder / "metrics.json")
    except (OSError, ValueError):
        return False
    card = read_card(find_bundle(run_folder))
    is_there = (folder / "predictions.csv").is_file()  # training writes only the metrics
    is_of_set = record["hashes"]["manifest"] == manifest_sha256
    return (
        is_there
        and is_of_set
        and record["hashes"]["weights"] == card.hashes.weights
        and record["model"].get("temperature") == card.temperature
    )


def _predictions_of(model: _Model, unlabelled: str, classes: Sequence[str], warn: Warn) -> SavedPredictions:
    """Read the predictions of images without labels from a CSV, or compute them."""
    if Path(unlabelled).suffix.lower() == ".csv":
        found = read_predictions(Path(unlabelled), classes)
    else:
        paths, rows, unreadable = [], [], []
        with model.decoders() as workers, closing(predict(model.load(), find_images([unlabelled]), workers)) as answers:
            for one in answers:
                if isinstance(one, Failure):
                    unreadable.append((one.path, one.reason))
                else:
                    paths.append(one.path)
                    rows.append(one.probabilities)
        found = SavedPredictions(
            tuple(paths), np.array(rows, np.float64).reshape(-1, len(classes)), unreadable=tuple(unreadable)
        )
    if found.unreadable:
        path, reason = found.unreadable[0]
        warn(f"{len(found.unreadable):,} image(s) without a label could not be read, such as {path}: {reason}")
    return found


def _label_errors(labelled: Labelled, classes: Sequence[str], limit: int) -> Part:
    labels = np.array([image.label for image in labelled.images])
    found = find_label_errors(labels, labelled.probabilities_NK)
    cards = [
        (_picture(labelled.images[row], classes, classes[k], labelled.probabilities_NK[row]),)
        for row, k in zip(found.images[:limit].tolist(), found.classes.tolist(), strict=False)
    ]
    agreed = float((labelled.probabilities_NK.argmax(axis=1) == labels).mean())
    return Part(
        "label-errors",
        "Labels that are probably wrong",
        "The model is confident of another class. The most probable errors come first.",
        cards,
        len(found.images),
        "No label is probably wrong.",
        f"The model agrees with {percent(agreed)} of the {len(labels):,} labels, and estimates that "
        f"{found.num_expected:.0f} are wrong: too many, if it is not accurate.",
    )


def _conflicting_pairs(labelled: Labelled, images: SetImages, limit: int, warn: Warn) -> Part:
    classes, rows = images.manifest.classes, {image.path: row for row, image in enumerate(labelled.images)}
    found = images.conflicting_pairs(workers=num_usable_cores())
    if found.num_unread:
        warn(f"{found.num_unread:,} image(s) of the set cannot be decoded and were not compared")

    def picture(image: SetImage) -> Picture:
        row = rows.get(image.path)
        if row is None:
            return _picture(image, classes)
        p = labelled.probabilities_NK[row]
        return _picture(image, classes, classes[int(p.argmax())], p)

    return Part(
        "pairs",
        "Near-duplicates with different labels",
        "Two images that look the same, the most similar pairs first. At most one of the labels can be right.",
        [(picture(left), picture(right)) for left, right in found.pairs[:limit]],
        found.num_found,
        "No two images that look the same have different labels.",
        "" if found.is_complete else "There are more: some images have very many near-duplicates.",
    )


def _label_next(new: SavedPredictions, classes: Sequence[str], limit: int) -> Part:
    by = "doubt and by how unlike the training images they are" if new.unlike is not None else "doubt"
    cards = []
    for row in labelling_order(new.probabilities_NK, new.unlike)[:limit].tolist():
        top = _top(new.probabilities_NK[row], classes)
        path = str(Path(new.paths[row]).absolute())
        cards.append((Picture(written(path), "", top[0][0], top, file=path),))
    return Part(
        "label-next",
        "Worth a label next",
        f"Images without a label, sorted by {by}.",
        cards,
        len(new.paths),
        "There is no image without a label.",
    )


def _picture(image: SetImage, classes: Sequence[str], suggested: str = "", p: F64 | None = None) -> Picture:
    top = () if p is None else _top(p, classes)
    return Picture(image.path, classes[image.label], suggested, top, split=image.split)


def _top(p: F64, classes: Sequence[str]) -> tuple[tuple[str, float], ...]:
    return tuple((classes[k], round(float(p[k]), 4)) for k in np.argsort(-p, kind="stable")[:_TOP].tolist())


def fit(parts: Sequence[Part], limit: int) -> list[Part]:
    """Return the parts with at most `limit` pictures: equal shares, and what a part does not need for the others."""
    sizes = [sum(map(len, part.cards)) for part in parts]
    shares, left = [0] * len(parts), limit
    for done, place in enumerate(sorted(range(len(parts)), key=lambda place: sizes[place])):
        shares[place] = min(sizes[place], left // (len(parts) - done))
        left -= shares[place]
    return [
        replace(part, cards=part.cards[: share // max(map(len, part.cards), default=1)])
        for part, share in zip(parts, shares, strict=True)
    ]


def _illustrate(parts: Sequence[Part], images: SetImages, warn: Warn) -> list[Part]:
    """Return the parts with pictures, and warn of those that cannot be shown."""
    failures: list[str] = []

    def illustrated(one: Picture) -> Picture:
        image = None if one.file else images.find(one.path)
        try:
            data = images.read(image) if image else read_regular(Path(one.file))
            return replace(one, url=data_url(data, side_px=PICTURE_SIDE_PX, quality=PICTURE_QUALITY))
        except (WastedError, UndecodableError, OSError) as error:
            failures.append(f"{one.path}: {str(error).splitlines()[0]}")
            return one

    shown = [replace(part, cards=[tuple(map(illustrated, card)) for card in part.cards]) for part in parts]
    if failures:
        warn(f"{len(failures):,} picture(s) cannot be shown, such as {failures[0]}")
    return shown
