"""`wasteddp serve --keep-doubtful FOLDER`: the photos that the model is not sure of, kept for labelling.

    FOLDER/<sha256 of the photo>.jpg     the bytes of the request, unchanged; .png and so on by their content
    FOLDER/kept.jsonl                    a line for each: its name and size, the time, the model, and the answer

Nothing in a name comes from the client. A photo is written whole before its line, so a kill may leave a photo without
a line; it gets one if it is sent again. A thread writes, and no answer waits for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from wasteddp.data.decoding.formats import SUFFIXES_OF, is_jpeg, open_image
from wasteddp.decisions.decide import PERSON, Policy
from wasteddp.errors import SettingsError, StorageError, print_line, print_warning, storage
from wasteddp.files import make_folder, open_descriptor, read_rows, try_lock_or_warn, write_atomically
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.prediction_files import Answer, json_entry

ROWS = "kept.jsonl"
RESULTS = ("kept", "repeated", "full", "busy", "failed")
_PENDING_BYTES = 64 << 20
_UNFINISHED = re.compile(r"[0-9a-f]{64}\.\w+\.tmp")  # of `write_atomically`


class KeptPhotos:
    """Keeps photos in a folder.

    Args:
        folder: created if missing.
        policy: a photo is kept if its decision is that a person looks; None: there are no decisions.
        below: a photo is also kept if the probability of its class is below this; 0: not for this reason.
        most_bytes: of all files in the folder together. Photos are no longer kept when it is reached.
        card: of the model.

    Attributes:
        counts: of doubtful photos by result, see `RESULTS`: kept; already in the folder; refused, because the folder is
            full or too many wait to be written; not written because of an error.

    Raises:
        SettingsError: no rule says which photos to keep, or another server keeps photos there.
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, policy: Policy | None, below: float, most_bytes: int, card: BundleCard) -> None:
        if not below and (policy is None or (policy.error is None and policy.rules.person is None)):
            raise SettingsError(
                f"photos are to be kept in {folder}, and {'the policy never' if policy else 'no policy'} asks a person",
                "no photo would ever be doubtful",
                "add --keep-below 0.7 (a probability), or --policy FILE of `wasteddp evaluate --max-error`",
            )
        self.folder, self.counts = folder, Counter[str]()
        self._below, self._most_bytes, self._card = below, most_bytes, card
        self._lock, self._pending_bytes, self._trouble = threading.Lock(), 0, ""
        path = folder / ROWS
        with storage("keeping doubtful photos", folder):
            make_folder(folder)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            self._rows = os.fdopen(open_descriptor(path, flags), "ab+", buffering=0)
        try:
            if not try_lock_or_warn(self._rows.fileno(), str(path), print_warning):
                raise SettingsError(
                    f"another server keeps photos in {folder}",
                    "both together would exceed the limit of its size",
                    "name another folder, or end the other server",
                )
            damaged = list[str]()
            rows = read_rows(path, damaged=damaged.append)
            self._names = {str(row["path"]) for row in rows if isinstance(row, dict) and "path" in row}
            if damaged:
                print_warning(
                    f"{path}: {len(damaged):,} lines cannot be read; their photos get others if they are sent again"
                )
            with storage("keeping doubtful photos", folder):
                self._remove_left()
                self._end_cut_row()
                self._size_bytes = self._measure()
        except BaseException:
            self._rows.close()
            raise
        self._writer = ThreadPoolExecutor(1, "keep")

    def offer(self, data: bytes, answer: Answer) -> None:
        """Keep a photo if its answer is doubtful. This does not wait for the disk."""
        is_doubtful = float(answer.probabilities.max()) < self._below or (
            answer.decision is not None and answer.decision.bin == PERSON
        )
        if not is_doubtful:
            return
        with self._lock:
            fits = self._pending_bytes + len(data) <= _PENDING_BYTES or not self._pending_bytes
            self._pending_bytes += len(data) if fits else 0
        if fits:
            self._writer.submit(self._keep, data, answer, datetime.now(UTC))
        else:
            self._count("busy", "the disk is slower than the photos come")

    def close(self) -> None:
        """Write what is left, and release the folder."""
        self._writer.shutdown()
        with suppress(OSError):
            self._rows.close()

    def __str__(self) -> str:
        counts = self.counts
        refused = f"; not kept: {', '.join(f'{counts[name]:,} {name}' for name in RESULTS[2:] if counts[name])}"
        return f"{counts['kept']:,} doubtful photos kept in {self.folder}" + refused.removesuffix("; not kept: ")

    def _keep(self, data: bytes, answer: Answer, when: datetime) -> None:
        try:
            self._count(*self._write(data, answer, when))
        except StorageError as error:
            self._count("failed", f"{error.found}")
        except Exception as error:  # of any kind: the next photo must be tried
            self._count("failed", repr(error))
        finally:
            with self._lock:
                self._pending_bytes -= len(data)

    def _write(self, data: bytes, answer: Answer, when: datetime) -> tuple[str, str]:
        """Write a photo and its line. Return the result, and what is wrong."""
        name = hashlib.sha256(data).hexdigest() + _suffix(data)
        if name in self._names:
            return "repeated", ""
        entry = json_entry(answer, self._card) | {"path": name}
        more = {
            "bytes": len(data),
            "time": when.isoformat(timespec="seconds"),
            "model": self._card.hashes.weights,
        }
        row = (json.dumps(entry | more, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        if self._size_bytes + len(data) + len(row) > self._most_bytes:
            self._size_bytes = self._measure()  # a person may have taken photos away
            if self._size_bytes + len(data) + len(row) > self._most_bytes:
                return "full", f"it has {self._size_bytes:,} bytes, and the limit is {self._most_bytes:,}"
        write_atomically(self.folder / name, data)
        with storage("keeping a doubtful photo", self.folder / ROWS):
            self._end_cut_row()
            if self._rows.write(row) != len(row):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._rows.fileno())
        self._size_bytes += len(data) + len(row)
        self._names.add(name)
        return "kept", ""

    def _count(self, result: str, trouble: str = "") -> None:
        """Count a photo. A trouble is printed once until another photo is kept."""
        with self._lock:
            self.counts[result] += 1
            is_new = bool(trouble) and result != self._trouble
            self._trouble = result if trouble else "" if result == "kept" else self._trouble
        if is_new:
            with suppress(OSError):
                print_warning(f"doubtful photos are not kept in {self.folder}: {trouble}")

    def _measure(self) -> int:
        with os.scandir(self.folder) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)

    def _remove_left(self) -> None:
        """Remove photos that a kill left half written."""
        left = [path for path in self.folder.glob("*.tmp") if _UNFINISHED.fullmatch(path.name)]
        for path in left:
            path.unlink()
        if left:
            print_line(f"{self.folder}: removed {len(left):,} photo(s) that a kill left half written: {left[0].name}")

    def _end_cut_row(self) -> None:
        """End a line that a kill or a full disk has cut."""
        if self._rows.seek(0, os.SEEK_END):
            self._rows.seek(-1, os.SEEK_END)
            if self._rows.read() != b"\n":
                self._rows.write(b"\n")


def _suffix(data: bytes) -> str:
    if is_jpeg(data):
        return ".jpg"
    with open_image(data) as image:
        name = image.format or ""
    return SUFFIXES_OF[name][0] if name in SUFFIXES_OF else f".{name.lower()}"
