"""`wasteddp predict`: classify files, folders and globs with a model bundle, and skip files that cannot be read.

Only the bundle is needed. A folder may have millions of images: files are listed lazily, results are written as they
come, and memory holds only the current batches and the first few unreadable files.

From folders and globs, files with an image suffix are used. A file that is named itself is used with any suffix.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path

from wasteddp.data.decoding.formats import IMAGE_SUFFIXES, IN_WORDS
from wasteddp.data.decoding.workers import Workers, start_workers
from wasteddp.data.file_loader import Unreadable, file_views
from wasteddp.decisions.decide import Policy
from wasteddp.errors import SourceError, inert, storage
from wasteddp.inference.any_classifier import AnyClassifier, is_onnx, load_classifier
from wasteddp.inference.policy_files import load_policy
from wasteddp.inference.prediction_files import (
    Answer,
    Failure,
    Prediction,
    Record,
    Terminal,
    csv_record,
    decisions_of,
    json_record,
    refuse_one_file,
)  # fmt: skip
from wasteddp.sharding.sources.files import ARCHIVES, Names, Walked, walk
from wasteddp.sharding.sources.layout import is_image

_KINDS = dict.fromkeys(ARCHIVES, "an archive") | dict.fromkeys((".csv", ".tsv"), "a table")


def predict_files(
    model: Path,
    paths: Sequence[str],
    *,
    csv: Path | None = None,
    json: Path | None = None,
    top: int = 3,
    policy: Path | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    tta: str = "none",
    workers: int | str = 0,
) -> None:
    """Classify image files, print the `top` classes of each, and write the requested files.

    Args:
        model: folder of a run or of its model, or an ONNX file of `wasteddp export`.
        paths: as `find_images` takes them.
        policy: policy.json of `wasteddp evaluate --bins`; None: that in an ONNX file, or no decision is made.
        batch_size: None: a size that suits the device.
        workers: as the setting data.workers.

    Raises:
        SourceError: a path matches nothing, no image could be classified, or both files are the same.
    """
    refuse_one_file(csv, json)
    images = find_images(paths)
    with ExitStack() as stack:
        decoders = stack.enter_context(start_workers(workers, _device_type(model, device)))
        classifier = load_classifier(model, device=device, batch_size=batch_size, tta=tta)
        rules = load_policy(policy, classifier.card, tta=tta) if policy else classifier.policy
        terminal = Terminal(classifier.card, top=top, training=classifier.training, policy=rules)
        records: list[Record] = [terminal]
        if csv:
            records.append(stack.enter_context(csv_record(csv, classifier.card, decides=rules is not None)))
        if json:
            records.append(stack.enter_context(json_record(json, classifier.card, tta=classifier.tta)))
        for prediction in stack.enter_context(
            closing(predict(classifier, images, decoders, terminal.tolerated.append, policy=rules))
        ):
            for record in records:
                record.add(prediction)
    terminal.finish([path for path in (csv, json) if path is not None])
    if terminal.num_classified == 0:
        raise SourceError(
            f"none of the {terminal.num_failed} files could be classified; the reasons are listed above",
            "there is no result",
            f"name images that can be read: {IN_WORDS}",
        )


def predict(
    classifier: AnyClassifier,
    paths: Iterable[str],
    workers: Workers,
    tolerated: Callable[[str], None] = lambda path: None,
    *,
    policy: Policy | None = None,
) -> Generator[Prediction, None, None]:
    """Yield one prediction for each path, in order, with the policy's decision. `tolerated`: see `file_views`."""
    size = classifier.card.preprocessing
    views = file_views(paths, classifier.how_to_view, side_px=size.image_size_px, workers=workers, tolerated=tolerated)
    with closing(views):
        for batch in classifier.batches(views):
            there = [view for _, view in batch if not isinstance(view, Unreadable)]
            probabilities_BK, unlike_B = classifier.answers(there)
            decided_B = decisions_of(policy, probabilities_BK) if policy else [None] * len(there)
            answers = zip(probabilities_BK, unlike_B, decided_B, strict=True)
            for path, view in batch:
                if isinstance(view, Unreadable):
                    kind = _kind(path)
                    yield Failure(path, f"it is {kind}, not an image" if kind else view.reason)
                else:
                    yield Answer(path, *next(answers))


def _device_type(model: Path, device: str) -> str:
    """Return the type of the device that will be used, without importing torch for an ONNX file."""
    if is_onnx(model):
        return "cpu" if device == "auto" else device.partition(":")[0]
    from wasteddp.inference.classifier import device_type

    return device_type(device)


def find_images(paths: Sequence[str]) -> Iterator[str]:
    """Return an iterator over the images in files, folders (with all subfolders) and globs (also `**`).

    Images are sorted within each. Links to folders are followed once; see `files.walk`. Every path is checked before
    this returns, so that a misspelt one is reported immediately. After that, memory holds only the names in one folder
    at a time. A folder that cannot be listed is yielded itself; reading it gives the reason.

    Raises:
        SourceError: a path or glob has no images, or all paths are archives or tables.
    """
    _refuse_sources(paths)
    return chain.from_iterable([_at_least_one(path) for path in paths])


def _at_least_one(path: str) -> Iterator[str]:
    with storage("looking for images", path):  # a name too long
        is_folder, exists = Path(path).is_dir(), Path(path).exists()
    if is_folder:
        images = _below(path)
    elif exists:  # before globs: a file may be called photo[1].jpg
        images = iter([path])
    elif glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207, Path.glob takes no absolute pattern
        images = (match for match in found if _is_image(match))
    else:
        raise SourceError(f"there is no {path}", "there is nothing to classify", "check the path")
    first = next(images, None)
    if first is None:
        raise SourceError(
            f"there is no image {'in' if is_folder else 'that matches'} {path}",
            "there is nothing to classify",
            f"check the path; folders and globs use files with these suffixes: {' '.join(sorted(IMAGE_SUFFIXES))}",
        )
    return chain([first], images)


def _kind(path: str) -> str:
    """Return what a file is that is no image by its suffix, but holds or names images; or ''."""
    return _KINDS.get(Path(path).suffix.lower(), "") if Path(path).is_file() else ""


def _refuse_sources(paths: Sequence[str]) -> None:
    """Refuse archives and tables, if nothing else is named. Among images, each is reported as unreadable.

    Raises:
        SourceError: all paths are archives or tables.
    """
    if all(map(_kind, paths)):
        raise SourceError(
            f"{paths[0]} is {_kind(paths[0])}, not an image",
            "images are classified from image files, folders and quoted globs",
            "name the images or their folder, and unpack an archive first; to measure a model on the labelled images "
            "of a zip, tar or CSV: wasteddp evaluate RUN --images FILE",
        )


def _below(folder: str) -> Iterator[str]:
    """Yield images in a folder, then in its subfolders; then report what was ignored, and which links were followed."""
    walked, others = Walked(), Names()
    for inside, files in walk(folder, (), walked):
        if isinstance(files, OSError):
            yield inside
            continue
        for file in files:
            if _is_image(file.path):
                yield file.path
            else:
                others.add(file.path)
    for line in [*walked.notes(), *others.note("ignored {} file(s) without the suffix of an image")]:
        print(inert(line), file=sys.stderr)


def _is_image(path: str) -> bool:
    # not a pipe or a device, which may never end; reading a dangling link gives the reason
    return is_image(path) and (Path(path).is_file() or not Path(path).exists())
