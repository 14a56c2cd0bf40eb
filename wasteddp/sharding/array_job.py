"""A large set made by several machines: each does its part of the work, the result is that of one machine, bit for bit.

    read_part   of each machine: examines its share of the images, and encodes those that cannot stay as they are,
                since where a shard ends depends on every size before it
    write_part  of each machine, when all have read: every N-th shard
    make_shards once, when all have written: finds everything done, and writes the manifest

Each step notes what it has done in a journal of its own in `.sharding/`, so one that failed is repeated alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wasteddp.data.manifest import MANIFEST_NAME
from wasteddp.errors import ShardError, SourceError, storage
from wasteddp.files import appended_rows, read_rows
from wasteddp.parallel import in_order
from wasteddp.progress import progress
from wasteddp.sharding import scan
from wasteddp.sharding.job import Job, Listing, Options, identity
from wasteddp.sharding.listing import list_images
from wasteddp.sharding.selection import select
from wasteddp.sharding.set_folder import clear_the_way, work_folder
from wasteddp.sharding.sources.archives import is_compressed_tar
from wasteddp.sharding.storing import load_sample, stays
from wasteddp.sharding.writer import Piece, Sample, ShardJournal, cut, tar_bytes, write_piece


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number` (from 1) of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From "3/8". Raises `SourceError` for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise SourceError(
                f"--part is {text!r}", "which part of the work is meant is not clear", "write it as 3/8: 1/8 to 8/8"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, num_items: int) -> range:
        """This part of the items, neighbours together: they lie in the same folders."""
        return range(num_items * (self.number - 1) // self.of, num_items * self.number // self.of)

    def file(self, work: Path, kind: str, suffix: str) -> Path:
        return work / f"{kind}-{self.number}-of-{self.of}.{suffix}"


def read_part(job: Job, part: Part, *, workers: int) -> None:
    """Examines this part of the images; a second call finds that done.

    Raises:
        SourceError: the images cannot become a set; ShardError: the folder holds another set; StorageError.
    """
    if _nothing_to_do(job):
        return
    with work_folder(job.out, shared=True) as work:
        listing = list_images(job, work)
        clear_the_way(job.out, work, overwrite=False)
        pictures = listing.layout.pictures
        mine = part.share(len(pictures))
        scanned = scan.scan(
            listing.source,
            pictures,
            workers=workers,
            journal=part.file(work, "scan", "jsonl"),
            limit=job.options.max_left_out,
            part=mine,
        )
        unsized = _unsized(scanned, job.options, _read_sizes(work, job.options))
        waiting = {_hash(scanned, i): i for i in mine if unsized[i]}

        def encode(sha256: str) -> tuple[str, int]:
            return sha256, len(_sample(job, listing, scanned, waiting[sha256]).image)

        path = part.file(work, "sizes", "jsonl")
        with appended_rows(path) as append, progress("encoding images", len(waiting)) as advance:
            for sha256, num_bytes in in_order(encode, waiting, workers=workers):
                append([sha256, *_encoding(job.options), num_bytes])
                advance()
        print(f"part {part}: {len(mine):,} of {len(pictures):,} images are read", flush=True)


def write_part(job: Job, part: Part, *, workers: int) -> None:
    """Writes this part of the shards, once all parts are read; a second call finds them written.

    Raises:
        ShardError: a part is not read yet, or the folder holds another set; SourceError; StorageError.
    """
    if _nothing_to_do(job):
        return
    with work_folder(job.out, shared=True) as work:
        listing = list_images(job, work)
        clear_the_way(job.out, work, overwrite=False)
        pictures, options = listing.layout.pictures, job.options
        scanned = scan.scan(
            listing.source,
            pictures,
            workers=workers,
            journal=part.file(work, "scan", "jsonl"),
            limit=options.max_left_out,
            part=range(0),
        )
        sizes = _read_sizes(work, options)
        _refuse_unread(~scanned.is_read | _unsized(scanned, options, sizes), part.of)
        selection = select(job, listing, scanned)
        pieces = _plan(job, listing, scanned, selection.members, sizes)
        mine = pieces[part.number - 1 :: part.of]
        journal = ShardJournal(part.file(work, "shards", "txt"), identity(job, listing, scanned.hashes()))
        num_samples = sum(piece.end - piece.begin for piece in mine)
        with storage("writing shards", job.out), progress("writing shards", num_samples) as advance:
            for piece in mine:
                write_piece(
                    piece,
                    selection.members[piece.split],
                    lambda i: _sample(job, listing, scanned, i),
                    folder=job.out,
                    journal=journal,
                    max_bytes=options.max_shard_bytes,
                    workers=workers,
                    advance=advance,
                )
        print(f"part {part}: {len(mine)} of {len(pieces)} shards are written", flush=True)


def _nothing_to_do(job: Job) -> bool:
    """Whether the set is finished. Refuses what cannot be done in parts."""
    job.options.check()
    if job.source.is_file() and is_compressed_tar(job.source):
        raise SourceError(
            f"{job.source} is a compressed tar",
            "it has no random access: each part would unpack all of it",
            "unpack it once, and give the folder or the plain tar",
        )
    if not (job.out / MANIFEST_NAME).exists():
        return False
    print(f"{job.out} has a manifest: no part is missing; without --part it is compared with these images", flush=True)
    return True


def _unsized(scanned: scan.ScanResult, options: Options, sizes: Mapping[str, int]) -> npt.NDArray[np.bool_]:
    """[N]: images that must be encoded, and whose size as encoded is not known."""
    usable = scanned.is_read & (scanned.records["problem"] == 0)
    changed = [i for i in np.flatnonzero(usable).tolist() if not stays(scanned.records[i], options)]
    unsized = np.zeros(len(usable), bool)
    unsized[[i for i in changed if _hash(scanned, i) not in sizes]] = True
    return unsized


def _hash(scanned: scan.ScanResult, index: int) -> str:
    sha256: bytes = scanned.records["sha256"][index].tobytes()
    return sha256.hex()


def _refuse_unread(unread: npt.NDArray[np.bool_], num_parts: int) -> None:
    if unread.any():
        parts = [Part(number, num_parts) for number in range(1, num_parts + 1)]
        missing = [str(part) for part in parts if unread[part.share(len(unread))].any()]
        raise ShardError(
            f"{unread.sum():,} of {len(unread):,} images are not read yet: part {', '.join(missing)}",
            "which images are duplicates, and where a shard ends, is known only when all are",
            "run `--part ... --stage read` for those parts first",
        )


def _plan(
    job: Job,
    listing: Listing,
    scanned: scan.ScanResult,
    members: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
) -> list[Piece]:
    """All shards of the set."""
    pictures, classes = listing.layout.pictures, listing.layout.classes

    def size(index: int) -> int:
        picture = pictures[index]
        as_is = stays(scanned.records[index], job.options)
        image_bytes = picture.file.size_bytes if as_is else sizes[_hash(scanned, index)]
        label = classes.index(picture.class_name)
        return tar_bytes(Sample(b"", bytes(32), label, picture.class_name, picture.file.path), image_bytes)

    pieces: list[Piece] = []
    for split, indices in members.items():
        pieces += cut(split, [size(index) for index in indices], max_bytes=job.options.max_shard_bytes)
    return pieces


def _sample(job: Job, listing: Listing, scanned: scan.ScanResult, index: int) -> Sample:
    layout = listing.layout
    return load_sample(listing.source, layout.pictures[index], scanned.records[index], layout.classes, job.options)


def _encoding(options: Options) -> tuple[int | None, int]:
    """What the size of an encoded image depends on, beside the image."""
    return options.max_side_px, options.quality


def _read_sizes(work: Path, options: Options) -> dict[str, int]:
    """Bytes of each image as encoded with these options, by the sha256 of its file."""
    sizes: dict[str, int] = {}
    for journal in sorted(work.glob("sizes-*.jsonl")):
        for row in read_rows(journal):
            try:
                sha256, max_side_px, quality, num_bytes = row
            except (ValueError, TypeError):  # that image is encoded again
                continue
            if (max_side_px, quality) == _encoding(options):
                sizes[sha256] = num_bytes
    return sizes
