"""The files of `wasteddp predict --watch`: a row is appended for each photo. The rows show what was answered before.

A row has the columns of `predict`, then `bytes`, `modified_ns` and `sha256` of the photo's file, and `model`: the
sha256 of the weights. Paths are absolute. Rows are on the disk when `save` returns. A row that a kill cut is removed
at the next start, and its photo is answered again.
"""

from __future__ import annotations

import csv
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wasteddp.errors import SourceError, print_warning, storage
from wasteddp.files import CsvWriter, open_descriptor, try_lock_or_warn
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.prediction_files import Prediction, csv_cells, csv_columns, json_entry

_FILE_COLUMNS = ("bytes", "modified_ns", "sha256", "model")
_JSON_BEGIN = b'{"path": "'


@dataclass(frozen=True, slots=True)
class Photo:
    """A file at one moment. `sha256` is empty if its content could not be read."""

    path: str  # absolute
    size_bytes: int
    modified_ns: int
    sha256: str = ""

    @property
    def stamp(self) -> tuple[str, int, int]:
        return _as_written(self.path), self.size_bytes, self.modified_ns

    def is_there(self) -> bool:
        """Return whether the path still holds this file, by its size and time."""
        try:
            status = os.stat(self.path)  # noqa: PTH116, as `sources.files`
        except (OSError, ValueError):
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size_bytes, self.modified_ns)


class AnsweredFile(ABC):
    """Rows of photos, in a file that is appended to.

    Args:
        path: of the file; created if missing.
        card: of the model.
        decides: whether there is a policy.

    Raises:
        SourceError: the file has something else than rows of this command with these columns, or another process
            appends to it.
        StorageError: it cannot be read or written.
    """

    def __init__(self, path: Path, card: BundleCard, *, decides: bool) -> None:
        self._path, self._card, self._decides = path, card, decides
        self._stamps, self._unread = set[tuple[str, int, int]](), set[tuple[str, int, int]]()
        self._by_sha256: dict[str, list[Photo]] = {}
        self._waiting = list[tuple[Photo, bytes]]()
        with storage("opening the predictions", path):
            self._file: IO[bytes] = os.fdopen(open_descriptor(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "ab+")
        try:
            self._lock_and_read()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        return self._path

    @property
    def num_rows(self) -> int:
        return sum(map(len, self._by_sha256.values()))

    def has_stamp(self, photo: Photo) -> bool:
        """Return whether there is a row of this path, size and time, whose content was read."""
        return photo.stamp in self._stamps

    def has_row(self, photo: Photo) -> bool:
        """Return whether there is a row of this path, size and time; also one that says why it could not be read."""
        return photo.stamp in self._stamps or photo.stamp in self._unread

    def has_content(self, photo: Photo) -> bool:
        """Return whether there is a row of this content: at this path, or at one from which it was renamed.

        A renamed file keeps its time, and is no longer at its old path. A copy is another photo.
        """
        return bool(photo.sha256) and self._find(photo) is not None

    def move(self, photo: Photo) -> None:
        """Count a photo for which `has_content` is true as answered at its new path or time."""
        if found := self._find(photo):
            self._by_sha256[photo.sha256].remove(found)
            self._remember(photo)

    def add(self, photo: Photo, prediction: Prediction) -> None:
        """Add a row, to be written by `save`."""
        more = (photo.size_bytes, photo.modified_ns, photo.sha256, self._card.hashes.weights)
        text = self._text(prediction, dict(zip(_FILE_COLUMNS, more, strict=True)))
        self._waiting.append((photo, text.encode(errors="backslashreplace")))

    def save(self) -> None:
        """Write the added rows. They are on the disk after this.

        Raises:
            SourceError: the file was removed or replaced. StorageError: it cannot be written.
        """
        if not self._waiting:
            return
        if not self._is_at_its_path():
            raise SourceError(
                f"{self._path} was removed, renamed or replaced while rows were appended to it",
                "they would not be found there, and the next start would answer these photos again",
                "put it back and start again; stop this command before changing the file, and copy it to read it",
            )
        with storage("writing the predictions", self._path):
            self._file.write(b"".join(row for _, row in self._waiting))
            self._file.flush()
            os.fsync(self._file.fileno())
        for photo, _ in self._waiting:
            self._remember(photo)
        self._waiting.clear()

    def close(self) -> None:
        with suppress(OSError):  # closing writes what is left, which fails again on a full disk
            self._file.close()

    @abstractmethod
    def _text(self, prediction: Prediction, more: dict[str, Any]) -> str:
        """Return a row with its newline."""

    @abstractmethod
    def _header(self) -> bytes:
        """Return what the file begins with."""

    @abstractmethod
    def _rows(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield each complete row after the header, and its number of bytes.

        Raises:
            ValueError: the file has something else.
        """

    def _find(self, photo: Photo) -> Photo | None:
        for found in self._by_sha256.get(photo.sha256, ()):
            if _as_written(found.path) == _as_written(photo.path) or (
                found.modified_ns == photo.modified_ns and not found.is_there()
            ):
                return found
        return None

    def _is_at_its_path(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))  # noqa: PTH116, as above
        except OSError:
            return False

    def _remember(self, photo: Photo) -> None:
        (self._stamps if photo.sha256 else self._unread).add(photo.stamp)
        self._by_sha256.setdefault(photo.sha256, []).append(photo)

    def _lock_and_read(self) -> None:
        if not try_lock_or_warn(self._file.fileno(), str(self._path), print_warning):
            raise SourceError(
                f"another process appends to {self._path}",
                "each photo would be answered twice",
                "wait for it to end, end it, or name another file",
            )
        end, header = 0, self._header()
        with storage("reading the predictions", self._path):
            self._file.seek(0)
            try:
                begin = self._file.read(len(header))
                if not header.startswith(begin):
                    raise ValueError(f"it does not begin with {header.decode().strip()}")
                if begin == header:
                    end = len(header)
                    for row, num_bytes in self._rows():
                        end += num_bytes
                        numbers = int(row["bytes"]), int(row["modified_ns"])
                        self._remember(Photo(str(row["path"]), *numbers, str(row["sha256"])))
            except (ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
                raise SourceError(
                    f"{self._path} has something else than rows of this command and model, at byte {end:,}: {error}",
                    "it cannot show which photos were answered",
                    "name another file; after a change of the classes or of --policy, too",
                ) from error
            if self._file.seek(0, os.SEEK_END) > end:
                self._file.truncate(end)
                print_warning(f"{self._path}: its last row was cut by a kill; that photo is answered again")
            if end < len(header):
                self._file.write(header)
                self._file.flush()


class AnsweredCsv(AnsweredFile):
    """Columns: those of `predict --csv`, then `bytes`, `modified_ns`, `sha256`, `model`."""

    def _text(self, prediction: Prediction, more: dict[str, Any]) -> str:
        return _csv_text([*csv_cells(prediction, self._card, decides=self._decides), *more.values()])

    def _columns(self) -> list[str]:
        return [*csv_columns(self._card, decides=self._decides), *_FILE_COLUMNS]

    def _header(self) -> bytes:
        return _csv_text(self._columns()).encode()

    def _rows(self) -> Iterator[tuple[dict[str, Any], int]]:
        record = b""
        for line in self._file:
            record += line
            if not record.endswith(b"\n") or record.count(b'"') % 2:  # a quoted cell may have newlines
                continue
            cells = next(csv.reader(io.StringIO(record.decode(), newline=""), strict=True))
            yield dict(zip(self._columns(), cells, strict=True)), len(record)
            record = b""
        if any(line.startswith((b"/", b'"/')) for line in record.splitlines()[1:]):  # a path: of the next row
            raise ValueError("a quote that does not end, and rows follow it")


class AnsweredJsonLines(AnsweredFile):
    """One object in a line for each photo, with the keys of `predict --json` and those of the photo's file."""

    def _text(self, prediction: Prediction, more: dict[str, Any]) -> str:
        return json.dumps(json_entry(prediction, self._card) | more, ensure_ascii=False) + "\n"

    def _header(self) -> bytes:
        return b""

    def _rows(self) -> Iterator[tuple[dict[str, Any], int]]:
        for line in self._file:
            if not line.strip(b"\0"):  # the end of a file after a power cut
                return
            if not line.startswith(_JSON_BEGIN[: len(line)]):
                raise ValueError("a line is not a row")
            if not line.endswith(b"\n"):
                return
            yield json.loads(line), len(line)


def _csv_text(cells: list[Any]) -> str:
    text = io.StringIO(newline="")
    CsvWriter(text).write(cells)
    return text.getvalue()


def _as_written(path: str) -> str:
    """Return a path as a CSV file has it, if bytes of it are not UTF-8; JSON and the disk give the other form."""
    return path.encode(errors="backslashreplace").decode()
