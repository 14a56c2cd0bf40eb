"""`wasteddp predict`: files, folders and globs through a model bundle, past whatever cannot be read.

Nothing but the bundle is needed. Memory holds the batches on their way and, of the unreadable files, the first few;
results go to the terminal and to the files as they come, so a folder may have millions of images.

What a user names on the command line -> image files, lazily: a folder may hold millions.

Of folders and globs the files with an image's suffix are taken; a file that is named itself is taken whatever it is.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from wasteddp.data.decoding.crop import EvaluationView
from wasteddp.data.decoding.workers import Workers, start_workers
from wasteddp.data.file_loader import Unreadable, file_views
from wasteddp.errors import SourceError
from wasteddp.inference.classifier import Classifier, device_type
from wasteddp.inference.prediction_files import Answer, Failure, Prediction, Record, Terminal, csv_record, json_record
from wasteddp.sharding.sources.layout import IMAGE_SUFFIXES, is_image


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


def find_images(paths: Sequence[str]) -> Iterator[str]:
    """The images named by files, folders (with all folders below) and globs (`**` too), sorted within each.

    Every path is looked at before the first image is given out, so a misspelt one is refused at once. Beyond that only
    the names in one folder at a time are held. A folder that cannot be listed is given out itself, for its reader to
    say why not.

    Raises:
        SourceError: a path or glob under which there is nothing.
    """
    return chain.from_iterable([_at_least_one(path) for path in paths])


def _at_least_one(path: str) -> Iterator[str]:
    if Path(path).is_dir():
        images = _below(path)
    elif Path(path).exists():  # before globs: a file may be called photo[1].jpg
        images = iter([path])
    elif glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207, Path.glob takes no absolute pattern
        images = (match for match in found if _is_image(match))
    else:
        raise SourceError(f"there is no {path}", "there is nothing to classify", "check the path")
    first = next(images, None)
    if first is None:
        raise SourceError(
            f"there is no image {'in' if Path(path).is_dir() else 'that matches'} {path}",
            "there is nothing to classify",
            f"check the path; of folders and globs the files called {' '.join(sorted(IMAGE_SUFFIXES))} are taken",
        )
    return chain([first], images)


def _below(folder: str) -> Iterator[str]:
    """Images in a folder, then in its folders; hidden ones are skipped (`._photo.jpg` is what macOS adds to zips)."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError:
        yield folder
        return
    yield from (entry.path for entry in listed if _is_image(entry.path))
    for entry in listed:
        if entry.is_dir(follow_symlinks=False):  # a link to a folder above would never end
            yield from _below(entry.path)


def _is_image(path: str) -> bool:
    # not a pipe or a device, which may never end; a dangling link is given out, for its reader to say so
    return is_image(path) and (Path(path).is_file() or not Path(path).exists())
