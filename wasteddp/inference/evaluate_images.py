"""`wasteddp evaluate RUN --images FOLDER`: measure a run's model on images of another site, without sharding them.

    runs/<name>/evaluations/<folder's name>/    the same files as of a split

The images are read as by `wasteddp shard` (class folders, zip, tar or CSV) and seen as by `wasteddp predict`.

Legend: N images that could be read.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from wasteddp.data import dataset
from wasteddp.data.decoding.decode import ImageHWC, UndecodableError
from wasteddp.data.decoding.formats import IN_WORDS
from wasteddp.decisions.unlikeness import UNLIKE_FROM
from wasteddp.errors import LaunchError, SettingsError, SourceError, inert, joined, print_line, visible
from wasteddp.files import temporary_folder
from wasteddp.inference.any_classifier import HOW_TO_ADD_FEATURES
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.comparison import Accuracy, compare, difference, near_by_hashes, print_comparison, read_home
from wasteddp.inference.evaluate import data_of
from wasteddp.inference.evaluation_files import Evaluation, print_evaluation, save_evaluation
from wasteddp.inference.metrics import Answers, Mistakes, Reliability, Seen, confusion_matrix, summarise
from wasteddp.inference.model_card.file import write_model_card
from wasteddp.parallel import in_order, num_usable_cores, progress
from wasteddp.settings import Data
from wasteddp.sharding import recipe
from wasteddp.sharding.sources.archives import open_source
from wasteddp.sharding.sources.files import Source
from wasteddp.sharding.sources.layout import (
    ClassFolders,
    Layout,
    SourceImage,
    alike,
    read_folders,
    read_table,
    rename_line,
    require_files,
)

_SPLITS = ("train", "val", "test")
_MOST_NAMED = 10


@dataclass(frozen=True, slots=True)
class ImagesOptions:
    """The command line of `wasteddp evaluate RUN --images`. None: a default that depends on the run or the device."""

    run: Path
    images: Path
    name: str = ""
    classes: Path | None = None  # YAML of `class: class of the model`
    class_folders: ClassFolders = ""
    ignore: tuple[str, ...] = ()
    encoding: str = ""
    near_duplicates: bool = False
    shards: str | None = None
    batch_size: int | None = None
    device: str = "auto"
    tta: str = "none"
    workers: int | str = 0  # like the setting data.workers, but threads only


def run(options: ImagesOptions) -> None:
    """Evaluate, print, and save in `RUN/evaluations/<name>/`.

    Raises:
        SourceError: there are no images, or classes that the model does not know.
        LaunchError: there are several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LaunchError(
            "evaluate --images was started in several processes",
            "each of them would evaluate all images",
            "start it in one process, without accelerate or torchrun",
        )
    decoders = Data(workers=options.workers)
    if decoders.uses_processes("cpu"):
        raise SettingsError(
            f"--workers {options.workers} was given with --images",
            "the images of a folder or an archive are decoded by threads",
            "give a number of threads, or leave it out",
        )
    name = _name(options)
    classifier = Classifier.load(options.run, device=options.device, batch_size=options.batch_size, tta=options.tta)
    console = Console()
    with temporary_folder(Path(tempfile.gettempdir()), "wasteddp-images-", print_line) as work:
        source, layout = _list(options, classifier.card.classes, work)
        evaluation, images, unreadable, digest = evaluate_images(
            classifier, source, layout.images, name, workers=decoders.num_workers or num_usable_cores()
        )
        near = _near(options, source, images) if options.near_duplicates else None
    record = _record(options, classifier, evaluation, layout, unreadable)
    record |= compare(evaluation, near)
    folder = options.run / "evaluations" / name
    settings = {"split": name, "images": str(options.images), "batch_size": classifier.batch_size}
    settings |= {"device": str(classifier.device), "tta": classifier.tta}
    save_evaluation(folder, evaluation, classifier.card, manifest_sha256=digest, options=settings, further=record)
    metrics = evaluation.seen.metrics
    print_evaluation(console, evaluation.seen, title=f"{options.run}, {options.images}: {metrics.num_samples} images")
    print_comparison(console, record)
    for line in _lines(options, classifier, evaluation, unreadable):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in (f"saved in {folder}", write_model_card(options.run)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def evaluate_images(
    classifier: Classifier, source: Source, images: Sequence[SourceImage], name: str, *, workers: int
) -> tuple[Evaluation, list[SourceImage], list[tuple[str, str]], str]:
    """Classify the images of a source.

    Args:
        images: their classes are the model's.
        name: of the evaluation.

    Returns:
        The evaluation, the N images that it covers, (path, reason) of the others, and a sha256 of paths, classes and
        bytes of the N images.

    Raises:
        SourceError: no image can be read.
    """
    classes = classifier.card.classes
    digest, read, unreadable = hashlib.sha256(), list[SourceImage](), list[tuple[str, str]]()

    def view(image: SourceImage) -> tuple[SourceImage, ImageHWC | str, str]:
        try:
            data = source.read(image.file.path)
            return image, classifier.view(data), hashlib.sha256(data).hexdigest()
        except OSError as error:
            return image, f"unreadable: {error.strerror or error}", ""
        except UndecodableError as error:
            return image, str(error), ""

    def views(advance: Any) -> Iterator[ImageHWC]:
        with closing(in_order(view, images, workers=workers)) as found:  # type: ignore[type-var]
            for image, pixels, sha256 in found:
                advance()
                if isinstance(pixels, str):
                    unreadable.append((image.file.path, pixels))
                    continue
                digest.update(f"{image.file.path}\0{image.class_name}\0{sha256}\n".encode("utf-8", "surrogateescape"))
                read.append(image)
                yield pixels

    probabilities, unlike = [], list[Any]()
    with progress("evaluating", len(images)) as advance:
        for batch in classifier.batches(views(advance)):
            answers_BK, unlike_B = classifier.answers(batch)
            probabilities.append(answers_BK)
            unlike.extend(unlike_B)
    if not read:
        raise SourceError(
            f"none of the {len(images)} images can be read; the first: {unreadable[0][0]}: {unreadable[0][1]}",
            "there is nothing to measure",
            f"name images that can be read: {IN_WORDS}",
        )
    labels = np.array([classes.index(image.class_name) for image in read], np.int32)
    probabilities_NK = np.concatenate(probabilities)
    confusion = confusion_matrix(labels, probabilities_NK.argmax(axis=1), len(classes))
    answers = Answers.from_probabilities(labels, probabilities_NK)
    seen = Seen(name, classes, confusion, summarise(confusion), Reliability.measure(answers), Mistakes.find(answers))
    unlike_N = np.array(unlike, np.float64) if classifier.training else None
    sources = tuple(image.file.path for image in read)
    return Evaluation(seen, sources, labels, probabilities_NK, unlike_N), read, unreadable, digest.hexdigest()


def _name(options: ImagesOptions) -> str:
    """Return the name of the evaluation's folder."""
    name = options.name or options.images.resolve().name.removesuffix("".join(options.images.suffixes[-1:]))
    if not options.name and name in _SPLITS:
        name = f"images-{name}"
    if name in _SPLITS or not re.fullmatch(r"[\w][\w .+-]*", name):
        raise SourceError(
            f"the evaluation would be called {name!r}",
            "it would replace that of a split, or it cannot be the name of a folder",
            "give another one: --name NAME, of letters, digits and . - _",
        )
    return name


def _list(options: ImagesOptions, classes: Sequence[str], work: Path) -> tuple[Source, Layout]:
    """Return the source and its images, with the model's names of classes.

    Raises:
        SourceError: the source is not readable, or has classes that the model does not know.
    """
    where = options.images
    source: Source
    if where.suffix.lower() == ".csv" and where.is_file():
        source, layout = read_table(where, may_lack=True)
        require_files(where, layout.images, allowed=len(layout.images) - 1, may_lack=True)
    else:
        source = open_source(where, work_folder=work, ignore=options.ignore, encoding=options.encoding)
        layout = read_folders(source, where, may_lack=True, class_folders=options.class_folders)
    names = recipe.load_pairs(options.classes, "name") if options.classes else {}
    if unused := sorted(names.keys() - set(layout.classes)):
        raise SourceError(
            f"{where} has no class {joined(unused)}; its classes are {joined(layout.classes)}",
            "the classes would not become those that the file of --classes describes",
            "fix the names in it; they are written as the folders or labels are",
        )
    images = tuple(replace(image, class_name=names.get(image.class_name, image.class_name)) for image in layout.images)
    counts = Counter(image.class_name for image in images)
    if unknown := sorted(counts.keys() - set(classes)):
        first = unknown[0]
        line = rename_line(first, alike(first, classes) or classes[0])
        raise SourceError(
            f"{where} has classes that the model does not know: "
            f"{', '.join(f'{visible(name)} ({counts[name]} images)' for name in unknown)}\n"
            f"  model:  {joined(classes)}",
            "no answer of the model could be right for these images",
            f"map them with --classes FILE, with lines such as `{line}`, or leave their folders out with --ignore "
            f"{shlex.quote(first)}",
        )
    for line in (*source.notes, *layout.notes()):
        print(inert(line))
    if layout.is_split:
        print(f"{where} is split; the images of all its splits are evaluated")
    return source, replace(layout, images=images, classes=tuple(counts))


def _near(options: ImagesOptions, source: Source, images: Sequence[SourceImage]) -> Any:
    """Return which images have a near-duplicate in train. All of them are read again."""
    data = data_of(options.run, options.shards)
    with dataset.open_dataset(data) as shards, shards.reader(data.train_split) as train:
        return near_by_hashes(train, (source.read(image.file.path) for image in images))


def _record(
    options: ImagesOptions,
    classifier: Classifier,
    evaluation: Evaluation,
    layout: Layout,
    unreadable: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Return what metrics.json records only of images."""
    found, _ = read_home(options.run, classifier.card.hashes.weights)
    record: dict[str, Any] = {
        "classes_without_images": [name for name in classifier.card.classes if name not in layout.classes],
        "unreadable": [{"source": path, "reason": reason} for path, reason in unreadable],
    }
    if evaluation.unlike_N is not None:
        record["num_unlike"] = int((evaluation.unlike_N >= UNLIKE_FROM).sum())
        record["mean_percentile"] = float(evaluation.unlike_N.mean())
    if found and found.num_images:
        metrics = evaluation.seen.metrics
        drop, low, high = difference(found, Accuracy(metrics.num_correct, metrics.num_samples))
        record["home"] = {**found.to_json(), "drop": drop, "drop_low": low, "drop_high": high}
    return record


def _lines(
    options: ImagesOptions, classifier: Classifier, evaluation: Evaluation, unreadable: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """Yield the sentences after the tables."""
    metrics, classes = evaluation.seen.metrics, classifier.card.classes
    absent = [name for name, one in zip(classes, metrics.per_class, strict=True) if not one.support]
    if unreadable:
        yield f"{len(unreadable)} image(s) could not be read and are not counted:"
        yield from (f"  {path}: {reason}" for path, reason in unreadable[:_MOST_NAMED])
        if len(unreadable) > _MOST_NAMED:
            yield f"  and {len(unreadable) - _MOST_NAMED} more, listed in metrics.json"
    here = Accuracy(metrics.num_correct, metrics.num_samples)
    yield f"here:      {here}"
    home, reason = read_home(options.run, classifier.card.hashes.weights)
    if home and home.num_images:
        drop, low, high = difference(home, here)
        yield f"home test: {home}"
        yield f"drop:      {_points(drop)} points, 95 % interval {_points(low)} to {_points(high)}"
        if absent:
            yield f"           the home test set has images of all classes; this one lacks {joined(absent)}"
    else:
        yield f"home test: not compared: {reason or 'it has no images'}"
    if evaluation.unlike_N is not None and classifier.training:
        yield classifier.training.verdict_of(evaluation.unlike_N)
    else:
        yield f"unlikeness: not known, the model has no features of its training images; {HOW_TO_ADD_FEATURES}"


def _points(share: float) -> str:
    return f"{100 * share:.1f}"
