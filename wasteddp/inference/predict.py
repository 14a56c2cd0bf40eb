"""`wasteddp predict`: files, folders and globs through a model bundle, past whatever cannot be read.

Nothing but the bundle is needed. Memory holds the batches on their way and, of the unreadable files, the first few;
results go to the terminal and to the files as they come, so a folder may have millions of images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from wasteddp.data.decoding import ImageHWC, UndecodableError
from wasteddp.data.parallel import in_order, num_usable_cores
from wasteddp.errors import SourceError
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.paths import find_images
from wasteddp.inference.prediction_record import (
    Answer,
    Failure,
    Prediction,
    Record,
    Terminal,
    csv_record,
    json_record,
)


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


def run(options: PredictOptions) -> None:
    """Classifies, prints, and writes the files asked for.

    Raises:
        SourceError: a path names nothing, or not one image could be classified.
    """
    images = find_images(options.paths)
    classifier = Classifier.load(options.model, device=options.device, batch_size=options.batch_size, tta=options.tta)
    terminal = Terminal(classifier.card, top=options.top)
    with ExitStack() as stack:
        records: list[Record] = [terminal]
        if options.csv:
            records.append(stack.enter_context(csv_record(options.csv, classifier.card)))
        if options.json:
            records.append(stack.enter_context(json_record(options.json, classifier.card, tta=classifier.tta)))
        for prediction in predict(classifier, images):
            for record in records:
                record.add(prediction)
    terminal.finish([path for path in (options.csv, options.json) if path is not None])
    if terminal.num_classified == 0:
        raise SourceError(
            f"none of the {terminal.num_failed} files could be classified; the reasons stand above",
            "there is no result",
            "name images that can be read: JPEG, PNG, WebP, GIF, BMP or TIFF",
        )


def predict(classifier: Classifier, paths: Iterable[str]) -> Iterator[Prediction]:
    """One prediction a path, in order."""

    def view_of(path: str) -> tuple[str, ImageHWC] | Failure:
        try:
            return path, classifier.view(Path(path).read_bytes())
        except UndecodableError as error:
            return Failure(path, str(error))
        except IsADirectoryError:  # `find_images` gives out a folder only if it could not list it
            return Failure(path, "unreadable: this folder cannot be listed")
        except OSError as error:
            return Failure(path, f"unreadable: {error.strerror}")

    for batch in classifier.batches(in_order(view_of, paths, workers=num_usable_cores())):
        answers_BK = iter(classifier.probabilities([one[1] for one in batch if not isinstance(one, Failure)]))
        for one in batch:
            yield one if isinstance(one, Failure) else Answer(one[0], next(answers_BK))
