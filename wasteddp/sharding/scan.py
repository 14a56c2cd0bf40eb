"""The first pass over the images: read each once, check that it decodes, and keep only what the later steps need.

One record of `SCAN_DTYPE` is kept for each image, 83 bytes; pixels are dropped immediately. A journal lets the pass
continue after a kill: an image whose path and stamp are in it is not read again. Several machines may each scan a part
of the images, with a journal of their own in the same folder (`scan*.jsonl`). All journals are read.
"""

from __future__ import annotations

import errno
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wasteddp.data import manifest
from wasteddp.data.decoding.decode import MAX_JPEG_SIDE_PX, UndecodableError, check_image
from wasteddp.data.decoding.formats import is_decoder_here_now
from wasteddp.data.manifest import LeftOut
from wasteddp.errors import SourceError, inert
from wasteddp.files import appended_rows, read_rows
from wasteddp.parallel import in_order, progress
from wasteddp.sharding import duplicates
from wasteddp.sharding.sources.files import File, Source
from wasteddp.sharding.sources.layout import SourceImage

SCAN_DTYPE = np.dtype(
    [
        ("sha256", "u1", (32,)),  # of the source file's bytes
        ("bits64", "<u8"),  # perceptual hash, see duplicates.py
        ("bits256", "u1", (32,)),
        ("height", "<u4"),  # px, upright
        ("width", "<u4"),
        ("problem", "u1"),  # 0: usable; else 1 + its place in manifest.REASONS
        ("is_plain", "?"),  # a JPEG that can go into a shard unchanged
        ("is_tolerated", "?"),  # a JPEG with faults that cost no pixel
    ]
)
Scan = npt.NDArray[np.void]

MAX_FILE_BYTES = 256 << 20  # no photograph is larger; the whole file is read into memory
DEFAULT_MAX_UNUSABLE = 0.1
_ALWAYS_ALLOWED = 10  # a tenth of a tiny set is less than one image
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # of a disk or a network file system; the next read may succeed


@dataclass(frozen=True, slots=True)
class ScanResult:
    records: Scan  # [N], in the order of the images
    details: Mapping[int, str]  # of the unusable images: why each cannot be used
    is_read: npt.NDArray[np.bool_]  # [N]; all are True unless only a part was scanned
    num_reused: int  # images that were read before this start

    def hashes(self) -> list[bytes]:
        return [row.tobytes() for row in self.records["sha256"]]

    def left_out(self, images: Sequence[SourceImage]) -> list[LeftOut]:
        reasons = manifest.REASONS
        return [
            LeftOut(images[i].file.path, reasons[int(self.records["problem"][i]) - 1], detail)
            for i, detail in self.details.items()
        ]


def max_unusable(num_images: int, limit: float | None) -> int:
    """Return how many unusable images are allowed: a tenth, at least 10; or `limit`, a fraction below 1 or a number."""
    if limit is None:
        return max(_ALWAYS_ALLOWED, int(num_images * DEFAULT_MAX_UNUSABLE))
    return int(limit) if limit >= 1 else int(num_images * limit)


def too_many(left_out: Sequence[LeftOut], num_images: int, limit: float | None, *, num_unread: int = 0) -> SourceError:
    """Return the error for more unusable images than `limit` allows. `num_unread`: images that were not read."""
    allowed = max_unusable(num_images, limit)
    counts = Counter(left.reason for left in left_out)
    by_reason = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    first = "".join(f"\n    {left.source}: {left.reason}: {left.detail}" for left in left_out[:5])
    unread = f"; {num_unread} were not read" if num_unread else ""
    return SourceError(
        f"{len(left_out)} of {num_images} images cannot be used ({by_reason}), more than the {allowed} allowed{unread}:"
        f"{first}",
        "the set would be much smaller than its source; a copy or a download may be incomplete",
        "repair or remove those images, or allow more with --max-left-out (0.2 for a fifth, 500 for a number)",
    )


def scan(
    source: Source,
    images: Sequence[SourceImage],
    *,
    workers: int,
    journal: Path,
    limit: float | None = None,
    part: range | None = None,
    max_side_px: int | None = None,
) -> ScanResult:
    """Examine the images in parallel, except those that are already in a journal.

    Args:
        journal: receives a line for each examined image. The other journals in its folder are read too.
        limit: see `max_unusable`.
        part: indices of the images to examine; None: all.
        max_side_px: to which larger images will be shrunk; None: an image that cannot be a JPEG is left out.

    Raises:
        SourceError: more images than `limit` allows cannot be used.
        StorageError: the journal cannot be written.
    """
    records = np.zeros(len(images), SCAN_DTYPE)
    details: dict[int, str] = {}
    is_read = np.zeros(len(images), bool)
    for one in {journal, *journal.parent.glob("scan*.jsonl")}:  # in any order: journals that have the same image agree
        is_read |= _replay(one, images, records, details)
    num_reused = int(is_read.sum())
    waiting = [index for index in (part if part is not None else range(len(images))) if not is_read[index]]
    allowed = max_unusable(len(images), limit)

    def examine_one(index: int) -> tuple[int, Scan, str]:
        return index, *examine(source, images[index].file)

    with appended_rows(journal) as append, progress("reading and checking images", len(waiting)) as advance:
        for index, record, detail in in_order(examine_one, waiting, workers=workers):
            records[index], is_read[index] = record, True
            if detail:
                details[index] = detail
            file = images[index].file
            append([file.path, file.stamp, record.tobytes().hex(), detail])
            advance()
            if len(details) > allowed:
                break
    if max_side_px is None:
        details |= _leave_out_wide(records)
    result = ScanResult(records, dict(sorted(details.items())), is_read, num_reused)
    if len(details) > allowed:
        unread = sum(not is_read[index] for index in waiting)
        raise too_many(result.left_out(images), len(images), limit, num_unread=unread)
    return result


def examine(source: Source, file: File) -> tuple[Scan, str]:
    """Return the record of an image, of `SCAN_DTYPE`, and what is wrong with it, or ''."""
    record = np.zeros((), SCAN_DTYPE)
    try:
        if file.size_bytes > MAX_FILE_BYTES:
            raise UndecodableError("too_large", f"{file.size_bytes:,} bytes, the limit is {MAX_FILE_BYTES:,}")
        data = _read(source, file)
        record["sha256"] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
        checked = check_image(data)
        record["height"], record["width"] = checked.height, checked.width
        record["is_plain"], record["is_tolerated"] = checked.is_plain, checked.is_tolerated
        record["bits64"], bits256 = duplicates.perceptual_hash(checked.grey)
        record["bits256"] = np.frombuffer(bits256, np.uint8)
    except UndecodableError as error:
        record["problem"] = 1 + manifest.REASONS.index(error.reason)
        return record, error.detail
    return record, ""


def _leave_out_wide(records: Scan) -> dict[int, str]:
    """Mark images that would have to be encoded and are too wide or too high for a JPEG. Return why, by index."""
    sides = np.maximum(records["height"], records["width"])
    wide = np.flatnonzero((records["problem"] == 0) & ~records["is_plain"] & (sides > MAX_JPEG_SIDE_PX)).tolist()
    records["problem"][wide] = 1 + manifest.REASONS.index("too_large")
    return {
        i: f"{records['width'][i]}x{records['height'][i]} px, a JPEG has at most {MAX_JPEG_SIDE_PX:,} on a side: "
        "--max-side shrinks it"
        for i in wide
    }


def report_tolerated(names: Sequence[str]) -> None:
    """Print how many JPEGs have faults that cost no pixel, and the first of them."""
    if names:
        first = inert(names[0])
        print(f"{len(names):,} JPEG(s) have faulty markers and are used, since all their pixels decode: {first}")


def fingerprints(source: Source, images: Sequence[SourceImage], *, workers: int) -> Iterator[bytes]:
    """Yield the sha256 of each file, as a scan finds it but without decoding; zeros for a file that cannot be read."""

    def fingerprint(image: SourceImage) -> bytes:
        try:
            if image.file.size_bytes <= MAX_FILE_BYTES:
                return hashlib.sha256(_read(source, image.file)).digest()
        except UndecodableError:
            pass
        return bytes(32)

    return in_order(fingerprint, images, workers=workers)


def _read(source: Source, file: File) -> bytes:
    try:
        try:
            return source.read(file.path)
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            return source.read(file.path)  # an error that passes must not leave an image out of the set
    except OSError as error:
        raise UndecodableError("unreadable", error.strerror or str(error)) from error


def _replay(
    journal: Path, images: Sequence[SourceImage], records: Scan, details: dict[int, str]
) -> npt.NDArray[np.bool_]:
    """Fill in the images that the journal has. Return which ones these are: [N]."""
    done = np.zeros(len(images), bool)
    place = {(image.file.path, image.file.stamp): index for index, image in enumerate(images)}
    for row in read_rows(journal):
        try:
            path, stamp, record, detail = row
            content = np.frombuffer(bytes.fromhex(record), SCAN_DTYPE)[0]
        except (ValueError, TypeError, IndexError):  # that image is read again
            continue
        index = place.get((path, stamp))
        if index is not None and not is_decoder_here_now(detail):
            records[index], done[index] = content, True
            if detail:
                details[index] = detail
    return done
