"""Make one shard set on several machines. The result equals that of one machine, bit for bit.

    read_part    on each machine: examine its part of the images, and encode those that cannot be stored unchanged,
                 because the end of a shard depends on the size of every sample before it
    write_part   on each machine, after all parts are read: write every N-th shard
    make_shards  once, after all parts are written: check that everything is done, and write the manifest

Each step records its work in a journal of its own in `.sharding/`, so that a failed step can be repeated alone.
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
from wasteddp.parallel import in_order, progress
from wasteddp.sharding import scan
from wasteddp.sharding.build import prepare_folder, settle, work_folder
from wasteddp.sharding.job import Job, Listing, Options, identity, list_images, load_sample, stays_unchanged
from wasteddp.sharding.selection import select
from wasteddp.sharding.sources.archives import is_compressed_tar
from wasteddp.sharding.writer import PlannedShard, Sample, ShardJournal, plan_shards, tar_bytes, write_planned_shard


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number` (from 1) of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse a part such as "3/8".

        Raises:
            SourceError: the text has another form, or the number is out of range.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise SourceError(
                f"--part is {text!r}",
                "the part of the work cannot be determined",
                "give a number and a total: 1/8, 2/8, ... 8/8",
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, num_items: int) -> range:
        """Return this part of the items: consecutive ones, which are mostly in the same folders."""
        return range(num_items * (self.number - 1) // self.of, num_items * self.number // self.of)

    def file(self, work: Path, kind: str, suffix: str) -> Path:
        return work / f"{kind}-{self.number}-of-{self.of}.{suffix}"


def read_part(job: Job, part: Part, *, workers: int) -> None:
    """Examine this part of the images. A second call does only what is missing.

    Raises:
        SourceError: the images cannot become a set.
        ShardError: the folder holds another set.
        StorageError: the folder cannot be written.
    """
    if _nothing_to_do(job):
        return
    with work_folder(job.out, shared=True) as work:
        listing = list_images(job, work)
        job = settle(job, listing, work)
        prepare_folder(job, work, overwrite=False)
        images = listing.layout.images
        mine = part.share(len(images))
        scanned = scan.scan(
            listing.source,
            images,
            workers=workers,
            journal=part.file(work, "scan", "jsonl"),
            limit=job.options.max_left_out,
            max_side_px=job.options.max_side_px,
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
        print(f"part {part}: {len(mine):,} of {len(images):,} images read", flush=True)


def write_part(job: Job, part: Part, *, workers: int) -> None:
    """Write this part of the shards, after all parts are read. A second call writes only what is missing.

    Raises:
        ShardError: a part is not read yet, or the folder holds another set.
        SourceError: the images cannot become a set.
        StorageError: the folder cannot be written.
    """
    if _nothing_to_do(job):
        return
    with work_folder(job.out, shared=True) as work:
        listing = list_images(job, work)
        job = settle(job, listing, work)
        prepare_folder(job, work, overwrite=False)
        images, options = listing.layout.images, job.options
        scanned = scan.scan(
            listing.source,
            images,
            workers=workers,
            journal=part.file(work, "scan", "jsonl"),
            limit=options.max_left_out,
            max_side_px=options.max_side_px,
            part=range(0),
        )
        sizes = _read_sizes(work, options)
        _refuse_unread(~scanned.is_read | _unsized(scanned, options, sizes), part.of)
        selection = select(job, listing, scanned)
        planned = _plan(job, listing, scanned, selection.members, sizes)
        mine = planned[part.number - 1 :: part.of]
        journal = ShardJournal(part.file(work, "shards", "txt"), identity(job, listing, scanned.hashes()))
        num_samples = sum(plan.end - plan.begin for plan in mine)
        with storage("writing shards", job.out), progress("writing shards", num_samples) as advance:
            for plan in mine:
                write_planned_shard(
                    plan,
                    selection.members[plan.split],
                    lambda i: _sample(job, listing, scanned, i),
                    folder=job.out,
                    journal=journal,
                    max_bytes=options.max_shard_bytes,
                    workers=workers,
                    advance=advance,
                )
        print(f"part {part}: {len(mine)} of {len(planned)} shards written", flush=True)


def _nothing_to_do(job: Job) -> bool:
    """Return whether the set is finished.

    Raises:
        SourceError: the source is a compressed tar, which cannot be read in parts.
    """
    job.options.check(may_lack_train=job.may_lack_classes)
    if job.source.is_file() and is_compressed_tar(job.source):
        raise SourceError(
            f"{job.source} is a compressed tar",
            "it has no random access, so each part would unpack all of it",
            "unpack it once, and give the folder or the uncompressed tar",
        )
    if not (job.out / MANIFEST_NAME).exists():
        return False
    print(
        f"{job.out} has a manifest: no part is missing; run without --part to compare it with these images", flush=True
    )
    return True


def _unsized(scanned: scan.ScanResult, options: Options, sizes: Mapping[str, int]) -> npt.NDArray[np.bool_]:
    """Return [N]: True for images that must be encoded and whose encoded size is not known yet."""
    usable = scanned.is_read & (scanned.records["problem"] == 0)
    changed = [i for i in np.flatnonzero(usable).tolist() if not stays_unchanged(scanned.records[i], options)]
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
            "duplicates and the ends of shards are known only after all images are read",
            "run `--part ... --stage read` for those parts first",
        )


def _plan(
    job: Job,
    listing: Listing,
    scanned: scan.ScanResult,
    members: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
) -> list[PlannedShard]:
    """Return all shards of the set, before they are written."""
    images, classes = listing.layout.images, listing.layout.classes

    def size(index: int) -> int:
        image = images[index]
        as_is = stays_unchanged(scanned.records[index], job.options)
        image_bytes = image.file.size_bytes if as_is else sizes[_hash(scanned, index)]
        label = classes.index(image.class_name)
        empty = Sample(b"", bytes(32), label, image.class_name, image.file.path, image.group)
        return tar_bytes(empty, image_bytes)

    planned: list[PlannedShard] = []
    for split, indices in members.items():
        planned += plan_shards(split, [size(index) for index in indices], max_bytes=job.options.max_shard_bytes)
    return planned


def _sample(job: Job, listing: Listing, scanned: scan.ScanResult, index: int) -> Sample:
    layout = listing.layout
    return load_sample(listing.source, layout.images[index], scanned.records[index], layout.classes, job.options)


def _encoding(options: Options) -> tuple[int | None, int]:
    """Return the options that determine the size of an encoded image."""
    return options.max_side_px, options.quality


def _read_sizes(work: Path, options: Options) -> dict[str, int]:
    """Return the bytes of each image encoded with these options, by the sha256 of its file."""
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
