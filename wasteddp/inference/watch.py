"""`wasteddp predict --watch`: classify the photos of a folder as they come, each once, also over restarts.

The folder is listed again and again, which works on network file systems too. A photo is read after its size and time
have stayed the same between two listings. One that cannot be decoded may be half written: it is tried again at the next
listings, and is then recorded as unreadable. If its size or time changes after that, it is a new photo. One whose bytes
could not be read at all gets a row too, and is answered when they can: a file server may have been away.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from wasteddp.data.decoding.decode import ImageHWC, UndecodableError, take_tolerated
from wasteddp.decisions.decide import Policy
from wasteddp.errors import SourceError, inert, print_warning
from wasteddp.files import open_regular
from wasteddp.inference.answered_files import AnsweredCsv, AnsweredFile, AnsweredJsonLines, Photo
from wasteddp.inference.any_classifier import AnyClassifier, load_classifier
from wasteddp.inference.policy_files import load_policy
from wasteddp.inference.prediction_files import Answer, Failure, Terminal, decisions_of, refuse_one_file
from wasteddp.parallel import in_order, num_usable_cores
from wasteddp.sharding.sources.files import Walked, walk
from wasteddp.sharding.sources.layout import is_image

TRIES = 5  # of a photo that cannot be read, one for each listing
CHANGES = 30  # of a photo, in as many listings, until a warning
EVERY_S = 2.0


def watch_folder(
    model: Path,
    folder: Path,
    *,
    csv: Path | None = None,
    json: Path | None = None,
    every_s: float = EVERY_S,
    top: int = 3,
    policy: Path | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    tta: str = "none",
) -> None:
    """Answer the photos of a folder and its subfolders as they come, until SIGINT or SIGTERM.

    Args:
        csv, json: files that the rows are appended to, one at least; the JSON file has one object in each line.
        every_s: seconds from the end of one listing to the next.
        model, top, policy, batch_size, device, tta: as `predict_files` takes them.

    Raises:
        SourceError: there is no such folder, no output file, or one that has something else.
    """
    if csv is None and json is None:
        raise SourceError(
            "--watch has no file for its answers",
            "nothing would show which photos were answered before a restart",
            "add --csv FILE or --json FILE.jsonl",
        )
    refuse_one_file(csv, json)
    if json is not None and json.suffix != ".jsonl":
        raise SourceError(
            f"--watch appends JSON lines, and {json} does not end in .jsonl",
            "other programs would read the file as one JSON value",
            f"name it {json.with_suffix('.jsonl')}",
        )
    if not folder.is_dir():
        raise SourceError(f"there is no folder {folder}", "there is nothing to watch", "check the path, or create it")
    with _stop_signals() as stop, ExitStack() as stack:
        classifier = load_classifier(model, device=device, batch_size=batch_size, tta=tta)
        rules = load_policy(policy, classifier.card, tta=tta) if policy else classifier.policy
        files: list[AnsweredFile] = []
        for path, kind in ((csv, AnsweredCsv), (json, AnsweredJsonLines)):
            if path is not None:
                files.append(stack.enter_context(closing(kind(path, classifier.card, decides=rules is not None))))
        terminal = Terminal(classifier.card, top=top, training=classifier.training, policy=rules)
        watch = Watch(folder, classifier, files, terminal, policy=rules)
        before = ", ".join(f"{file.num_rows:,} rows in {file.path}" for file in files)
        print(inert(f"watching {folder}, every {every_s:g} s; {before}; end it with Ctrl-C or SIGTERM"), flush=True)
        while not stop.is_set:
            watch.poll(stop)
            stop.wait(every_s)
        watch.finish()


class Stop:
    """Whether to stop. Unlike `threading.Event`, it may be set by a signal's handler while this thread waits."""

    def __init__(self) -> None:
        self.is_set = False
        self._read_end, self._write_end = os.pipe()

    def set(self) -> None:
        self.is_set = True
        os.write(self._write_end, b"\0")

    def wait(self, longest_s: float) -> None:
        select.select([self._read_end], [], [], longest_s)

    def close(self) -> None:
        os.close(self._read_end)
        os.close(self._write_end)


@dataclass(frozen=True, slots=True)
class _Read:
    """A photo that was read: its view, or why it has none; neither if it changed or is answered already."""

    photo: Photo
    view: ImageHWC | None = None
    reason: str = ""
    is_answered: bool = False
    is_tolerated: bool = False


class Watch:
    """The state between listings: which photos wait, and how often each was tried.

    Args:
        folder: with all its subfolders; hidden and system files are ignored, as in `predict`.
        files: that rows are appended to. A photo is answered when all have its row.
        terminal: receives the same answers.
    """

    def __init__(
        self,
        folder: Path,
        classifier: AnyClassifier,
        files: Sequence[AnsweredFile],
        terminal: Terminal,
        *,
        policy: Policy | None = None,
    ) -> None:
        self._folder, self._classifier, self._files = folder.absolute(), classifier, files
        self._terminal, self._policy = terminal, policy
        self._waiting: dict[str, Photo] = {}  # of the last listing, not answered
        self._tries: dict[str, tuple[Photo, int]] = {}
        self._changes: dict[str, int] = {}  # how many listings in a row found another size or time
        self._unlisted: frozenset[str] = frozenset()  # folders that the last listing could not read
        self._notes: list[str] = []  # on what the last listing ignored
        self._num_renamed, self._num_gone = 0, 0

    def poll(self, stop: Stop) -> None:
        """List the folder, and answer the photos that have not changed since the last listing.

        Args:
            stop: ends it after the current batch.
        """
        before, self._waiting = self._waiting, self._list()
        if self._unlisted:
            self._waiting = before | self._waiting
        else:
            self._report_gone({path for path in before.keys() - self._waiting.keys() if self._is_new(before[path])})
        settled = [photo for path, photo in self._waiting.items() if before.get(path) == photo]
        self._report_changing(before)
        for batch in self._classifier.batches(settled):
            if stop.is_set:
                return
            self._answer(batch)

    def finish(self) -> None:
        """Print the totals."""
        self._terminal.finish([file.path for file in self._files])
        for count, text in (
            (self._num_renamed, "were answered before, under another name or time"),
            (self._num_gone, "disappeared before they were read"),
            (sum(map(self._is_new, self._waiting.values())), "wait, and are answered after the next start"),
        ):
            if count:
                print(f"{count:,} photo(s) {text}")

    def _list(self) -> dict[str, Photo]:
        photos, unlisted, walked = {}, {}, Walked()
        for inside, files in walk(str(self._folder), (), walked):
            if isinstance(files, OSError):
                unlisted[inside] = files.strerror or str(files)
                continue
            for entry in files:
                if not is_image(entry.path) or (photo := _photo(entry)) is None:
                    continue
                if not all(file.has_stamp(photo) for file in self._files):
                    photos[entry.path] = photo
        for inside in unlisted.keys() - self._unlisted:
            print_warning(f"{inside} cannot be listed: {unlisted[inside]}; it is tried again")
        self._unlisted = frozenset(unlisted)
        if (notes := walked.notes()) != self._notes:
            for line in notes:
                print(inert(line), file=sys.stderr)
            self._notes = notes
        return photos

    def _is_new(self, photo: Photo) -> bool:
        return not all(file.has_row(photo) for file in self._files)

    def _report_changing(self, before: dict[str, Photo]) -> None:
        changed = [path for path, photo in self._waiting.items() if before.get(path, photo) != photo]
        self._changes = {path: self._changes.get(path, 0) + 1 for path in changed}
        for path in changed:
            if self._changes[path] == CHANGES:
                print_warning(
                    f"{path} was another file at each of {CHANGES} listings, and is answered once it stays the same "
                    "for two: let the camera write each photo under a name of its own"
                )

    def _report_gone(self, gone: set[str]) -> None:
        for path in sorted(gone):
            self._num_gone += 1
            self._tries.pop(path, None)
            print_warning(f"{path} disappeared before it was read")

    def _answer(self, batch: Sequence[Photo]) -> None:
        there = list[_Read]()
        for one in in_order(self._read, batch, workers=num_usable_cores()):
            if one.view is not None:
                there.append(one)
            elif one.is_answered:
                self._take_as_answered(one.photo)
            elif one.reason:
                self._try_later(one)
            if one.is_tolerated:
                self._terminal.tolerated.append(one.photo.path)
        views = [one.view for one in there if one.view is not None]
        probabilities_BK, unlike_B = self._classifier.answers(views)
        decided_B: Sequence[Any] = decisions_of(self._policy, probabilities_BK) if self._policy else [None] * len(views)
        for one, *answer in zip(there, probabilities_BK, unlike_B, decided_B, strict=True):
            self._record(one.photo, Answer(one.photo.path, *answer))
        for file in self._files:
            file.save()
        sys.stdout.flush()

    def _read(self, photo: Photo) -> _Read:
        """Read a photo whole, and decode it unless it is answered already."""
        try:
            with open_regular(photo.path) as file:
                data, status = file.read(), os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (photo.size_bytes, photo.modified_ns):
                return _Read(photo)  # it changed: the next listing has its new size or time
            photo = replace(photo, sha256=hashlib.sha256(data).hexdigest())
            if all(file.has_stamp(photo) or file.has_content(photo) for file in self._files):
                return _Read(photo, is_answered=True)
            return _Read(photo, self._classifier.view(data), is_tolerated=take_tolerated())
        except OSError as error:
            return _Read(photo, reason=f"unreadable: {error.strerror}")
        except UndecodableError as error:
            return _Read(photo, reason=str(error))

    def _take_as_answered(self, photo: Photo) -> None:
        for file in self._files:
            file.move(photo)
        self._forget(photo)
        self._num_renamed += 1

    def _try_later(self, one: _Read) -> None:
        path = one.photo.path
        if not self._is_new(one.photo):
            return
        last, number = self._tries.get(path, (one.photo, 0))
        number = number + 1 if last == one.photo else 1
        self._tries[path] = one.photo, number
        if number >= TRIES:
            self._record(one.photo, Failure(path, one.reason))

    def _record(self, photo: Photo, prediction: Answer | Failure) -> None:
        for file in self._files:
            if file.has_content(photo):
                file.move(photo)
            elif not (file.has_stamp(photo) if photo.sha256 else file.has_row(photo)):
                file.add(photo, prediction)
        self._terminal.add(prediction)
        self._forget(photo)

    def _forget(self, photo: Photo) -> None:
        self._waiting.pop(photo.path, None)
        self._tries.pop(photo.path, None)


def _photo(entry: os.DirEntry[str]) -> Photo | None:
    try:
        status = entry.stat()
    except OSError:  # a dangling link; reading it gives the reason
        return Photo(entry.path, 0, 0)
    is_regular = stat.S_ISREG(status.st_mode)  # a pipe or a device may never end
    return Photo(entry.path, status.st_size, status.st_mtime_ns) if is_regular else None


@contextmanager
def _stop_signals() -> Iterator[Stop]:
    """Yield what the first SIGINT or SIGTERM sets. The second one has its usual effect."""
    stop = Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    before = {number: signal.signal(number, handle) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield stop
    finally:
        restore()
        stop.close()
