"""`wasteddp predict`: files, folders and globs through a model bundle, past whatever cannot be read.

Nothing but the bundle is needed. Memory holds the batches on their way and, of the unreadable files, the first few;
results go to the terminal and to the files as they come, so a folder may have millions of images.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from wasteddp.data.decoding.views import EvaluationView
from wasteddp.data.decoding.workers import Workers, start_workers
from wasteddp.data.file_loader import Unreadable, file_views
from wasteddp.errors import SourceError
from wasteddp.inference.classifier import Classifier, device_type
from wasteddp.inference.image_paths import find_images
from wasteddp.inference.prediction_files import Answer, Failure, Prediction, Record, Terminal, csv_record, json_record


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """The command line of `wasteddp predict`. None is the default that depends on the device, or: not wanted."""

    model: Path
    paths: tuple[str, ...]
    csv: Path | None = None
    json: Path | None = None
    top: int = 3
    batch_size: int | None = None
    device: str = "auto"
    tta: str = "none"
    workers: int | str = 0  # as the setting data.workers


def run(options: PredictOptions) -> None:
    """Classifies, prints, and writes the files asked for.

    Raises:
        SourceError: a path names nothing, or not one image could be classified.
    """
    images = find_images(options.paths)
    with ExitStack() as stack:
        workers = stack.enter_context(start_workers(options.workers, device_type(options.device)))
        classifier = Classifier.load(
            options.model, device=options.device, batch_size=options.batch_size, tta=options.tta
        )
        terminal = Terminal(classifier.card, top=options.top)
        records: list[Record] = [terminal]
        if options.csv:
            records.append(stack.enter_context(csv_record(options.csv, classifier.card)))
        if options.json:
            records.append(stack.enter_context(json_record(options.json, classifier.card, tta=classifier.tta)))
        for prediction in stack.enter_context(closing(predict(classifier, images, workers))):
            for record in records:
                record.add(prediction)
    terminal.finish([path for path in (options.csv, options.json) if path is not None])
    if terminal.num_classified == 0:
        raise SourceError(
            f"none of the {terminal.num_failed} files could be classified; the reasons stand above",
            "there is no result",
            "name images that can be read: JPEG, PNG, WebP, GIF, BMP or TIFF",
        )


def predict(classifier: Classifier, paths: Iterable[str], workers: Workers) -> Generator[Prediction, None, None]:
    """One prediction a path, in order."""
    size = classifier.card.preprocessing
    views = file_views(paths, EvaluationView(size.resize_px), side_px=size.image_size_px, workers=workers)
    with closing(views):
        for batch in classifier.batches(views):
            answers_BK = iter(classifier.probabilities([view for _, view in batch if not isinstance(view, Unreadable)]))
            for path, view in batch:
                yield Failure(path, view.reason) if isinstance(view, Unreadable) else Answer(path, next(answers_BK))
