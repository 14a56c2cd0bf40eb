"""Write samples in a fixed order to tars and indexes. A kill at any time costs at most one unfinished shard.

A shard is written under a temporary name, synced and renamed, and then recorded in the journal with its hashes. The
next start checks the recorded shards against their hashes and continues after the last good one. The end of a shard
depends only on the samples before it: the bytes equal those of an uninterrupted run, with any number of workers.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from pathlib import Path

import numpy as np

from wasteddp.data.manifest import INDEX_DTYPE, Shard
from wasteddp.errors import ShardError, StorageError, storage
from wasteddp.files import sync_folder, write_atomically
from wasteddp.parallel import in_order

_OWNER = "wasteddp"
_MODE = 0o444
_BLOCK = 512  # bytes of a tar header, and the unit that members are padded to


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a shard: `<key>.jpg` and `<key>.json`."""

    image: bytes
    sha256: bytes  # of `image`
    label: int
    label_name: str
    source: str

    def to_json(self) -> bytes:
        fields = {
            "label": self.label_name,
            "label_number": self.label,
            "source": self.source,
            "sha256": self.sha256.hex(),
        }
        return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace")  # \\udcXX: not UTF-8


class ShardJournal:
    """The finished shards, one line each, after a first line that names their plan.

    Several machines may write shards of one set, each with a journal of its own in the same folder (`shards*.txt`).
    """

    def __init__(self, path: Path, plan: str) -> None:
        """Load the shards of `plan` from all journals. The journal at `path` is emptied if it has another plan."""
        self._path = path
        self._finished: dict[str, Shard] = {}  # by the tar's name
        for journal in sorted({path, *path.parent.glob("shards*.txt")}):
            with storage("reading the journal of the shards", journal):
                lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
            if lines and lines[0] == plan:
                self._take(lines[1:])
            elif journal == path:
                write_atomically(path, f"{plan}\n".encode())

    def _take(self, lines: Sequence[str]) -> None:
        for line in lines:
            try:
                shard = Shard(**json.loads(line))
            except (ValueError, TypeError):  # truncated by a kill: that shard is written again
                continue
            self._finished[shard.tar] = shard

    def good_shard(self, name: str, folder: Path) -> Shard | None:
        """Return the shard of that name if it is finished and unchanged on the disk."""
        shard = self._finished.get(f"{name}.tar")
        if shard is None or not ((folder / shard.tar).exists() and (folder / shard.index).exists()):
            return None
        found = sha256_of(folder / shard.tar), sha256_of(folder / shard.index)
        return shard if found == (shard.sha256, shard.index_sha256) else None

    def good_shards(self, split: str, folder: Path, *, workers: int) -> list[Shard]:
        """Return the finished shards of a split, up to the first that is missing or changed."""
        num_recorded = next(n for n in count() if f"{_name(split, n)}.tar" not in self._finished)
        names = [_name(split, number) for number in range(num_recorded)]
        checked = in_order(lambda name: self.good_shard(name, folder), names, workers=workers)
        return [shard for shard in takewhile(lambda shard: shard is not None, checked) if shard is not None]

    def add(self, shard: Shard) -> None:
        with storage("writing the journal of the shards", self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(shard)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def write_split(
    split: str,
    items: Sequence[int],
    load: Callable[[int], Sample],
    *,
    folder: Path,
    journal: ShardJournal,
    max_bytes: int,
    workers: int,
    advance: Callable[[], None],
) -> tuple[Shard, ...]:
    """Load the samples of a split in parallel and write them to shards. A shard ends when it reaches `max_bytes`."""
    shards = journal.good_shards(split, folder, workers=workers)
    number = sum(shard.num_samples for shard in shards)
    for _ in range(number):
        advance()
    samples = in_order(load, items[number:], workers=workers)
    while number < len(items):
        shard = _write_shard(folder, split, len(shards), samples, number, max_bytes=max_bytes, advance=advance)
        journal.add(shard)
        shards.append(shard)
        number += shard.num_samples
    return tuple(shards)


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard to write: samples begin .. end - 1 of a split, and the number of bytes of its tar."""

    split: str
    number: int
    begin: int
    end: int
    num_bytes: int

    @property
    def name(self) -> str:
        return _name(self.split, self.number)


def plan_shards(split: str, member_bytes: Sequence[int], *, max_bytes: int) -> list[PlannedShard]:
    """Return the shards that `write_split` would write, from the sizes alone.

    Args:
        member_bytes: bytes of each sample in a tar, see `tar_bytes`.
    """
    planned: list[PlannedShard] = []
    begin = total = 0
    for end, size in enumerate(member_bytes, start=1):
        total += size
        if total >= max_bytes or end == len(member_bytes):
            planned.append(
                PlannedShard(split, len(planned), begin, end, _padded(total + 2 * _BLOCK, tarfile.RECORDSIZE))
            )
            begin, total = end, 0
    return planned


def tar_bytes(sample: Sample, image_bytes: int) -> int:
    """Return the bytes in a tar of a sample with an image of that size: two headers and two padded members."""
    return 2 * _BLOCK + _padded(image_bytes, _BLOCK) + _padded(len(sample.to_json()), _BLOCK)


def write_planned_shard(
    plan: PlannedShard,
    items: Sequence[int],
    load: Callable[[int], Sample],
    *,
    folder: Path,
    journal: ShardJournal,
    max_bytes: int,
    workers: int,
    advance: Callable[[], None],
) -> None:
    """Write one shard of a split whose samples are `items`, unless the journal has it.

    Raises:
        ShardError: the shard did not end where it was planned, so it differs from the shard of a single machine.
    """
    if journal.good_shard(plan.name, folder):
        for _ in range(plan.begin, plan.end):
            advance()
        return
    samples = in_order(load, items[plan.begin : plan.end], workers=workers)
    shard = _write_shard(folder, plan.split, plan.number, samples, plan.begin, max_bytes=max_bytes, advance=advance)
    if (shard.num_samples, shard.num_bytes) != (plan.end - plan.begin, plan.num_bytes):
        raise ShardError(
            f"{shard.tar} has {shard.num_samples} samples in {shard.num_bytes:,} bytes; planned were "
            f"{plan.end - plan.begin} in {plan.num_bytes:,}",
            "the shards would overlap or leave gaps, because an image was encoded differently than when it was read",
            "use the same version of this program and its libraries on all machines, remove .sharding and start again",
        )
    journal.add(shard)


def sha256_of(path: Path) -> str:
    with storage("reading", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(split: str, number: int) -> str:
    return f"{split}-{number:06d}"


def _padded(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit) * unit


def _write_shard(
    folder: Path,
    split: str,
    shard_number: int,
    samples: Iterator[Sample],
    first_number: int,
    *,
    max_bytes: int,
    advance: Callable[[], None],
) -> Shard:
    name = _name(split, shard_number)
    tar, temporary = folder / f"{name}.tar", folder / f"{name}.tar.tmp"
    records: list[tuple[int, int, int, bytes]] = []
    import webdataset  # here, since it imports torch: a mistake in the arguments is reported before that

    try:
        with storage("writing a shard", folder), temporary.open("wb") as file:
            hashing = _HashingFile(file)
            writer = webdataset.TarWriter(hashing, encoder=False, mtime=0, user=_OWNER, group=_OWNER, mode=_MODE)
            # Each header is one block. TarWriter does not pass this default of its own on to the stream.
            writer.tarstream.format = tarfile.USTAR_FORMAT
            try:
                for sample in samples:
                    # The writer sorts members by name: jpg comes before json, directly after its header of one block.
                    offset = writer.tarstream.offset + _BLOCK
                    key = f"{split}-{first_number + len(records):08d}"
                    writer.write({"__key__": key, "jpg": sample.image, "json": sample.to_json()})
                    records.append((offset, len(sample.image), sample.label, sample.sha256))
                    advance()
                    if writer.tarstream.offset >= max_bytes:
                        break
                writer.close()
            except BaseException:
                hashing.is_abandoned = True
                raise
            file.flush()
            os.fsync(file.fileno())
    except StorageError:
        temporary.unlink(missing_ok=True)  # free the space; finished shards are kept
        raise
    index = np.zeros(len(records), INDEX_DTYPE)
    for row, (offset, length, label, sha256) in zip(index, records, strict=True):
        row["offset"], row["length"], row["label"] = offset, length, label
        row["sha256"] = np.frombuffer(sha256, np.uint8)
    index_bytes = index.tobytes()
    with storage("writing a shard", tar):
        temporary.replace(tar)
    write_atomically(folder / f"{name}.idx", index_bytes)
    sync_folder(folder)
    return Shard(
        tar=tar.name,
        index=f"{name}.idx",
        num_samples=len(records),
        num_bytes=hashing.num_bytes,
        sha256=hashing.sha256.hexdigest(),
        index_sha256=hashlib.sha256(index_bytes).hexdigest(),
    )


class _HashingFile(io.RawIOBase):
    """Hashes the bytes that it writes, so that a shard need not be read again.

    An abandoned file drops them: a tar stream writes its buffer when it is destroyed, after the file was closed.
    """

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.is_abandoned = False

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.is_abandoned:
            return len(data)
        self.sha256.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)
