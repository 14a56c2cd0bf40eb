"""The first pass over the images: read each once, prove that it decodes, and keep only what the later steps need.

What is kept is one record of `SCAN_DTYPE` an image, 82 bytes; pixels are dropped at once. A journal makes the pass
survive a kill: an image whose path and stamp are in it is not read again. Several machines may scan parts of the
pictures, each with a journal of its own beside the others' (`scan*.jsonl`); all of them are taken over.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wasteddp.data import manifest
from wasteddp.data.decoding.decode import UndecodableError, decode_gray, is_plain_jpeg, size_px
from wasteddp.data.manifest import LeftOut
from wasteddp.errors import SourceError
from wasteddp.files import appended_rows, read_rows
from wasteddp.parallel import in_order
from wasteddp.progress import progress
from wasteddp.sharding import near_duplicates
from wasteddp.sharding.sources.archives import File, Source
from wasteddp.sharding.sources.layout import Picture

SCAN_DTYPE = np.dtype(
    [
        ("sha256", "u1", (32,)),  # of the source file's bytes
        ("bits64", "<u8"),  # perceptual hash, see near_duplicates
        ("bits256", "u1", (32,)),
        ("height", "<u4"),  # px, upright
        ("width", "<u4"),
        ("problem", "u1"),  # 0: usable; else 1 + its place in manifest.REASONS
        ("is_plain", "?"),  # a JPEG that could go into a shard byte for byte
    ]
)
Scan = npt.NDArray[np.void]

MAX_FILE_BYTES = 256 << 20  # no photograph is larger; it would be read into memory whole
DEFAULT_MAX_UNUSABLE = 0.1
_ALWAYS_ALLOWED = 10  # a tenth of a tiny set is no image at all


@dataclass(frozen=True, slots=True)
class ScanResult:
    records: Scan  # [N], in the order of the pictures
    details: Mapping[int, str]  # why an image cannot be used, for those that cannot
    is_read: npt.NDArray[np.bool_]  # [N]; all, unless a part was asked for

    def hashes(self) -> list[bytes]:
        return [row.tobytes() for row in self.records["sha256"]]

    def left_out(self, pictures: Sequence[Picture]) -> list[LeftOut]:
        reasons = manifest.REASONS
        return [
            LeftOut(pictures[i].file.path, reasons[int(self.records["problem"][i]) - 1], detail)
            for i, detail in self.details.items()
        ]


def max_unusable(num_images: int, limit: float | None) -> int:
    """How many unusable images are borne: a tenth, but at least 10; or `limit`, a fraction (below 1) or a number."""
    if limit is None:
        return max(_ALWAYS_ALLOWED, int(num_images * DEFAULT_MAX_UNUSABLE))
    return int(limit) if limit >= 1 else int(num_images * limit)


def too_many(left_out: Sequence[LeftOut], num_images: int, limit: float | None) -> SourceError:
    """The error for more unusable images than `limit` bears."""
    allowed = max_unusable(num_images, limit)
    counts = Counter(left.reason for left in left_out)
    by_reason = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    first = "".join(f"\n    {left.source}: {left.reason}: {left.detail}" for left in left_out[:5])
    return SourceError(
        f"{len(left_out)} of {num_images} images cannot be used ({by_reason}), more than the {allowed} allowed:{first}",
        "the set would be much smaller than its source, most likely because a copy or a download was cut short",
        "repair or remove those images, or allow more with --max-left-out (0.2 for a fifth, 500 for a number)",
    )


def scan(
    source: Source,
    pictures: Sequence[Picture],
    *,
    workers: int,
    journal: Path,
    limit: float | None = None,
    part: range | None = None,
) -> ScanResult:
    """Examines the pictures, in parallel, but for those that an earlier start or another machine has noted.

    Args:
        journal: takes a line for each picture examined; what is noted in its siblings counts too.
        limit: see `max_unusable`.
        part: examine these alone; None: all.

    Raises:
        SourceError: more images than `limit` allows cannot be used.
        StorageError: the journal cannot be written.
    """
    records = np.zeros(len(pictures), SCAN_DTYPE)
    details: dict[int, str] = {}
    is_read = np.zeros(len(pictures), bool)
    for one in {journal, *journal.parent.glob("scan*.jsonl")}:  # in any order: what two of them know is the same
        is_read |= _replay(one, pictures, records, details)
    waiting = [index for index in (part if part is not None else range(len(pictures))) if not is_read[index]]
    allowed = max_unusable(len(pictures), limit)

    def examine_one(index: int) -> tuple[int, Scan, str]:
        return index, *examine(source, pictures[index].file)

    with appended_rows(journal) as append, progress("reading and proving images", len(waiting)) as advance:
        for index, record, detail in in_order(examine_one, waiting, workers=workers):
            records[index], is_read[index] = record, True
            if detail:
                details[index] = detail
            file = pictures[index].file
            append([file.path, file.stamp, record.tobytes().hex(), detail])
            advance()
            if len(details) > allowed:
                break
    result = ScanResult(records, dict(sorted(details.items())), is_read)
    if len(details) > allowed:
        raise too_many(result.left_out(pictures), len(pictures), limit)
    return result


def examine(source: Source, file: File) -> tuple[Scan, str]:
    """One record of `SCAN_DTYPE`, and what is wrong with the image, or nothing."""
    record = np.zeros((), SCAN_DTYPE)
    try:
        if file.size_bytes > MAX_FILE_BYTES:
            raise UndecodableError("too_large", f"{file.size_bytes:,} bytes, the limit is {MAX_FILE_BYTES:,}")
        data = _read(source, file)
        record["sha256"] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
        record["height"], record["width"] = size_px(data)
        record["is_plain"] = is_plain = is_plain_jpeg(data)
        grey = decode_gray(data, min_side_px=64, is_plain=is_plain)
        record["bits64"], bits256 = near_duplicates.perceptual_hash(grey)
        record["bits256"] = np.frombuffer(bits256, np.uint8)
    except UndecodableError as error:
        record["problem"] = 1 + manifest.REASONS.index(error.reason)
        return record, error.detail
    return record, ""


def fingerprints(source: Source, pictures: Sequence[Picture], *, workers: int) -> Iterator[bytes]:
    """sha256 of each file, without decoding; of a file that cannot be read, zeros. The same as a scan would find."""

    def fingerprint(picture: Picture) -> bytes:
        try:
            if picture.file.size_bytes <= MAX_FILE_BYTES:
                return hashlib.sha256(_read(source, picture.file)).digest()
        except UndecodableError:
            pass
        return bytes(32)

    return in_order(fingerprint, pictures, workers=workers)


def _read(source: Source, file: File) -> bytes:
    try:
        return source.read(file.path)
    except OSError as error:
        raise UndecodableError("unreadable", error.strerror or str(error)) from error


def _replay(
    journal: Path, pictures: Sequence[Picture], records: Scan, details: dict[int, str]
) -> npt.NDArray[np.bool_]:
    """Fills in what the journal knows, and says for which pictures it did."""
    done = np.zeros(len(pictures), bool)
    place = {(picture.file.path, picture.file.stamp): index for index, picture in enumerate(pictures)}
    for row in read_rows(journal):
        try:
            path, stamp, record, detail = row
            content = np.frombuffer(bytes.fromhex(record), SCAN_DTYPE)[0]
        except (ValueError, TypeError, IndexError):  # that image is simply read again
            continue
        index = place.get((path, stamp))
        if index is not None:
            records[index], done[index] = content, True
            if detail:
                details[index] = detail
    return done
