"""Images -> a shard set: the steps from a source to a manifest, in order. Each step's how is in a module of its own.

    list -> read and prove -> drop copies -> choose splits -> count near-duplicates -> write tars -> write manifest

All that this leaves behind while it works is in `.sharding/` inside the set's folder; the manifest comes last. What
other machines have read and written there (`parts`) is taken over, so that this is also the last step of an array job.

The folder of a shard set while it is being made: who may write there, what may be replaced, what is cleaned up.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wasteddp import __version__
from wasteddp.data.manifest import MANIFEST_NAME, Manifest, Split
from wasteddp.errors import ShardError, storage
from wasteddp.files import sync_folder, try_lock
from wasteddp.parallel import progress
from wasteddp.sharding import scan
from wasteddp.sharding.job import Job, Listing, Options, identity, list_images, load_sample
from wasteddp.sharding.selection import select
from wasteddp.sharding.writer import ShardJournal, write_split

__all__ = ["Job", "Options", "find_made", "make_shards"]

TOOL = f"wasteddp {__version__}"
WORK_NAME = ".sharding"
_BEGUN_NAME = "begun"  # from here on, what lies in the set's folder under our names is ours
_OWN_FILE = re.compile(r"(train|val|test)-\d{6}\.(tar|idx)(\.tmp)?|manifest\.json\.tmp")


def make_shards(job: Job, *, workers: int, overwrite: bool = False) -> Manifest:
    """Makes the set, or finishes it, or finds that it is made already.

    Raises:
        SourceError: the images cannot become a set; ShardError: the folder holds another set; StorageError.
    """
    started = time.monotonic()
    job.options.check()
    with work_folder(job.out) as work:
        listing = list_images(job, work)
        num_images = len(listing.layout.pictures)
        if (job.out / MANIFEST_NAME).exists() and not overwrite:
            hashes = list(scan.fingerprints(listing.source, listing.layout.pictures, workers=workers))
            return _already_made(job, identity(job, listing, hashes), num_images)
        clear_the_way(job.out, work, overwrite=overwrite)
        continues = any(work.glob("scan*.jsonl"))  # then a rate would count images that an earlier start has read
        scanned = scan.scan(
            listing.source,
            listing.layout.pictures,
            workers=workers,
            journal=work / "scan.jsonl",
            limit=job.options.max_left_out,
        )
        manifest = _make(job, listing, scanned, work, workers=workers)
        elapsed_s = time.monotonic() - started
        rate = "continued an earlier start" if continues else f"{num_images / elapsed_s:,.0f} images/s"
        print(f"{num_images:,} images in {elapsed_s:.1f} s: {rate}", flush=True)
    return manifest


def _make(job: Job, listing: Listing, scanned: scan.ScanResult, work: Path, *, workers: int) -> Manifest:
    """Everything after the scan; from here on the result depends on `job`, the listing and the records alone."""
    pictures, classes, records = listing.layout.pictures, listing.layout.classes, scanned.records
    selection = select(job, listing, scanned)
    inputs_sha256 = identity(job, listing, scanned.hashes())
    made = {}
    with storage("writing shards", job.out), progress("writing shards", selection.num_samples) as advance:
        journal = ShardJournal(work / "shards.txt", inputs_sha256)
        for split, members in selection.members.items():
            shards = write_split(
                split,
                members,
                lambda i: load_sample(listing.source, pictures[i], records[i], classes, job.options),
                folder=job.out,
                journal=journal,
                max_bytes=job.options.max_shard_bytes,
                workers=workers,
                advance=advance,
            )
            counts = Counter(pictures[i].class_name for i in members)
            made[split] = Split(split, shards, tuple(counts[name] for name in classes))
    manifest = Manifest(
        folder=job.out,
        name=job.out.resolve().name,
        classes=classes,
        splits=made,
        bins=dict(job.bins),
        left_out=selection.left_out,
        near_duplicates=selection.near_duplicates,
        recipe=job.described() | {"inputs_sha256": inputs_sha256},
        tool=TOOL,
    )
    remove_own_files(job.out, keep={f for s in made.values() for shard in s.shards for f in (shard.tar, shard.index)})
    manifest.save()
    return Manifest.load(job.out)


def find_made(job: Job) -> Manifest | None:
    """The finished set of a recipe that draws its images, which need not be drawn to know that they are the same."""
    if not (job.out / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.load(job.out)
    described = {key: value for key, value in manifest.recipe.items() if key != "inputs_sha256"}
    if described != job.described() or manifest.bins != dict(job.bins):
        return None
    check_files(manifest)
    return manifest


def _already_made(job: Job, identity: str, num_images: int) -> Manifest:
    manifest = Manifest.load(job.out)
    if manifest.recipe.get("inputs_sha256") != identity:
        raise ShardError(
            f"{job.out} is a finished set of other images or other options than these {num_images:,} images",
            "it would be lost, and runs that were trained on it could no longer be explained",
            "give another --out, or --overwrite to replace it",
        )
    check_files(manifest)
    print(f"{job.out} is already made of these {num_images:,} images with these options: nothing to do")
    return manifest


@contextmanager
def work_folder(out: Path, *, shared: bool = False) -> Iterator[Path]:
    """The hidden folder for journals; it stays only if a set was begun and is not finished.

    Held by one process, or by any number that each make a part (`shared`); these leave the tidying to the last step.
    """
    work = out / WORK_NAME
    with storage("making the folder of the set", out):
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("a+")  # readable: network file systems want that for a shared lock
    with lock:
        if not try_lock(lock.fileno(), shared=shared):
            raise ShardError(
                f"another `wasteddp shard` is writing {out}", "two would overwrite each other", "wait for it to end"
            )
        try:
            yield work
        finally:
            if not shared and ((out / MANIFEST_NAME).exists() or not (work / _BEGUN_NAME).exists()):
                shutil.rmtree(work, ignore_errors=True)
                if not any(out.iterdir()):
                    out.rmdir()


def clear_the_way(out: Path, work: Path, *, overwrite: bool) -> None:
    """Removes an old set when told to: its manifest first, so that a kill never leaves a manifest of half a set."""
    begun = work / _BEGUN_NAME
    if not begun.exists() and not overwrite:
        there = [path.name for path in out.iterdir() if _OWN_FILE.fullmatch(path.name)]
        if there:
            raise ShardError(
                f"{out} holds {len(there)} file(s) that this would replace, such as {min(there)}, and no manifest",
                "they are not from an unfinished run, so somebody may want them",
                f"give another --out; or `wasteddp index {out}` to use them; or --overwrite to replace them",
            )
    with storage("removing the old manifest", out):
        begun.touch()
        if (out / MANIFEST_NAME).exists():
            (out / MANIFEST_NAME).unlink()
            sync_folder(out)


def remove_own_files(out: Path, keep: set[str]) -> None:
    """Removes what an earlier, different run left under the names that are ours; nothing else."""
    with storage("removing files of an earlier run", out):
        for path in out.iterdir():
            if _OWN_FILE.fullmatch(path.name) and path.name not in keep:
                path.unlink()


def check_files(manifest: Manifest) -> None:
    """Raises `ShardError` if a shard is missing or has another size than the manifest says."""
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        path = manifest.folder / shard.tar
        found = path.stat().st_size if path.exists() else 0
        if found != shard.num_bytes or not (manifest.folder / shard.index).exists():
            raise ShardError(
                f"{path} or its index is not as it was: {found:,} bytes, the manifest says {shard.num_bytes:,}",
                "the set is damaged",
                "make it again with --overwrite; `wasteddp verify` names all that is damaged",
            )
