"""Write samples in a fixed order to tars and indexes. A kill at any time costs at most one unfinished shard.

A shard is written under a temporary name, synced and renamed, and then recorded in the journal with its hashes. The
next start checks the recorded shards against their hashes and continues after the last good one. The end of a shard
depends only on the samples before it: the bytes equal those of an uninterrupted run, with any number of workers.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import IO

from wasteddp.data.manifest import Shard, pad_size, write_index
from wasteddp.errors import ShardError, storage
from wasteddp.files import appended_rows, read_regular, read_rows, sha256_of, write_atomically, written_whole
from wasteddp.parallel import in_order

_OWNER = "wasteddp"
_MODE = 0o444


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a shard: `<key>.jpg` and `<key>.json`."""

    image: bytes
    sha256: bytes  # of `image`
    label: int
    label_name: str
    source: str
    group: str = ""  # a site, camera, session or object

    def to_json(self) -> bytes:
        fields = {
            "label": self.label_name,
            "label_number": self.label,
            "source": self.source,
            "sha256": self.sha256.hex(),
        } | ({"group": self.group} if self.group else {})
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
                begin = read_regular(journal)[: len(plan)] if journal.exists() else b""
            if begin == plan.encode():
                self._take(journal)
            elif journal == path:
                write_atomically(path, f"{plan}\n".encode())

    def _take(self, journal: Path) -> None:
        for row in read_rows(journal):
            try:
                shard = Shard(**row)
            except TypeError:  # that shard is simply written again
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
        with appended_rows(self._path) as append:
            append(asdict(shard))


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
            size = pad_size(total + 2 * BLOCKSIZE, tarfile.RECORDSIZE)
            planned.append(PlannedShard(split, len(planned), begin, end, size))
            begin, total = end, 0
    return planned


def tar_bytes(sample: Sample, image_bytes: int) -> int:
    """Return the bytes in a tar of a sample with an image of that size: two headers and two padded members."""
    return 2 * BLOCKSIZE + pad_size(image_bytes) + pad_size(len(sample.to_json()))


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


def _name(split: str, number: int) -> str:
    return f"{split}-{number:06d}"


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
    tar = folder / f"{name}.tar"
    records: list[tuple[int, int, int, bytes]] = []
    import webdataset  # here, since it imports torch: a mistake in the arguments is reported before that

    with storage("writing a shard", folder), written_whole(tar) as file:
        hashing = _HashingFile(file)
        writer = webdataset.TarWriter(hashing, encoder=False, mtime=0, user=_OWNER, group=_OWNER, mode=_MODE)
        # Each header is one block. TarWriter does not pass this default of its own on to the stream.
        writer.tarstream.format = tarfile.USTAR_FORMAT
        try:
            for sample in samples:
                # The writer sorts members by name: jpg comes before json, directly after its header of one block.
                offset = writer.tarstream.offset + BLOCKSIZE
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
    return Shard(
        tar=tar.name,
        index=f"{name}.idx",
        num_samples=len(records),
        num_bytes=hashing.num_bytes,
        sha256=hashing.sha256.hexdigest(),
        index_sha256=write_index(folder / f"{name}.idx", records),
    )


class _HashingFile(io.RawIOBase):
    """Hashes the bytes that it writes, so that a shard need not be read again.

    An abandoned file drops them: a tar stream writes its buffer when it is destroyed, after the file was closed.
    """

    def __init__(self, file: IO[bytes]) -> None:
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
