"""Turn images into a shard set: the steps from a source to a manifest, in order. Each step has a module of its own.

    list -> read and check -> drop copies -> choose splits -> count near-duplicates -> write tars -> write manifest

Intermediate files are in `.sharding/` inside the set's folder; the manifest is written last. Images and shards that
other machines have read and written there (`array_job`) are reused, so this is also the last step of an array job.

This module also guards the set's folder while the set is unfinished: which process may write there, which files may be
replaced, and which are removed.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from wasteddp import __version__
from wasteddp.data.dataset import GROUPS_NAME, save_groups
from wasteddp.data.manifest import BEGUN_NAME, MANIFEST_NAME, WORK_NAME, Manifest, Split
from wasteddp.errors import ShardError, SourceError, storage
from wasteddp.files import make_folder, read_regular, sync_folder, try_lock_or_announce, write_atomically
from wasteddp.lock_files import LockFile
from wasteddp.parallel import progress
from wasteddp.sharding import scan, splits
from wasteddp.sharding.groups import groups_of_set
from wasteddp.sharding.job import Job, Listing, Options, groups_of_old, identity, list_images, load_sample
from wasteddp.sharding.selection import select
from wasteddp.sharding.writer import ShardJournal, write_split

__all__ = ["Job", "Options", "find_finished", "make_shards"]

TOOL = f"wasteddp {__version__}"
_OWN_FILE = re.compile(r"(train|val|test|fold-\d+)-\d{6}\.(tar|idx)(\.tmp)?|groups\.bin(\.tmp)?|manifest\.json\.tmp")


def make_shards(job: Job, *, workers: int, overwrite: bool = False) -> Manifest:
    """Create the set, finish an interrupted one, or return the finished one.

    Raises:
        SourceError: the images cannot become a set.
        ShardError: the folder holds another set.
        StorageError: the folder cannot be written.
    """
    started = time.monotonic()
    job.options.check(may_lack_train=job.may_lack_classes)
    with work_folder(job.out) as work:
        listing = list_images(job, work)
        job = settle(job, listing, work)
        num_images = len(listing.layout.images)
        if (job.out / MANIFEST_NAME).exists() and not overwrite:
            hashes = list(scan.fingerprints(listing.source, listing.layout.images, workers=workers))
            return _load_finished(job, identity(job, listing, hashes), num_images)
        prepare_folder(job, work, overwrite=overwrite)
        scanned = scan.scan(
            listing.source,
            listing.layout.images,
            workers=workers,
            journal=work / "scan.jsonl",
            limit=job.options.max_left_out,
            max_side_px=job.options.max_side_px,
        )
        tolerated = np.flatnonzero(scanned.records["is_tolerated"] & (scanned.records["problem"] == 0)).tolist()
        scan.report_tolerated([listing.layout.images[i].file.path for i in tolerated])
        manifest = _write_set(job, listing, scanned, work, workers=workers)
        elapsed_s = time.monotonic() - started
        num_reused = scanned.num_reused  # a rate would count these
        rate = f"{num_reused:,} of them were read before" if num_reused else f"{num_images / elapsed_s:,.0f} images/s"
        print(f"{num_images:,} images in {elapsed_s:.1f} s: {rate}", flush=True)
    return manifest


def _write_set(job: Job, listing: Listing, scanned: scan.ScanResult, work: Path, *, workers: int) -> Manifest:
    """Do everything after the scan. The result depends only on `job`, the listing and the records."""
    images, classes, records = listing.layout.images, listing.layout.classes, scanned.records
    selection = select(job, listing, scanned)
    inputs_sha256 = identity(job, listing, scanned.hashes())
    written = {}
    with storage("writing shards", job.out), progress("writing shards", selection.num_samples) as advance:
        journal = ShardJournal(work / "shards.txt", inputs_sha256)
        for split, members in selection.members.items():
            shards = write_split(
                split,
                members,
                lambda i: load_sample(listing.source, images[i], records[i], classes, job.options),
                folder=job.out,
                journal=journal,
                max_bytes=job.options.max_shard_bytes,
                workers=workers,
                advance=advance,
            )
            counts = Counter(images[i].class_name for i in members)
            written[split] = Split(split, shards, tuple(counts[name] for name in classes))
    manifest = Manifest(
        folder=job.out,
        name=job.out.resolve().name,
        classes=classes,
        splits=written,
        bins=dict(job.bins),
        left_out=selection.left_out,
        near_duplicates=selection.near_duplicates,
        recipe=job.described() | {"inputs_sha256": inputs_sha256},
        num_tolerated=int(records["is_tolerated"][[i for of in selection.members.values() for i in of]].sum()),
        tool=TOOL,
    )
    if rule := job.options.group_rule:
        found = groups_of_set(written, selection.members, images, rule)
        manifest = replace(manifest, groups=save_groups(manifest, found))
    keep = {name for split in written.values() for shard in split.shards for name in (shard.tar, shard.index)}
    keep |= {GROUPS_NAME} if manifest.groups else set()
    remove_own_files(job.out, keep=keep)
    manifest.save()
    return Manifest.load(job.out)


def settle(job: Job, listing: Listing, work: Path) -> Job:
    """Return the job with all options of the split. A set that is there already, or was begun, keeps its rule."""
    options, begun = job.options, work / BEGUN_NAME
    if job.extends:
        options = _extended(job.extends, options, is_split=listing.layout.is_split)
    if not listing.layout.is_split and options.split_rule is None:
        if (job.out / MANIFEST_NAME).exists():
            recorded = Manifest.load(job.out).recipe.get("options", {"split_rule": None})
            options = replace(options, split_rule=recorded.get("split_rule", "hash"))  # older sets do not name it
        elif begun.exists():
            with storage("reading the rule of the split", begun):
                options = replace(options, split_rule=read_regular(begun).decode() or "hash")
        if options.split_rule == "hash":
            print(f"{job.out} keeps its rule for splits, hash; --split-rule stratified gives each class its fractions")
    return replace(job, options=options.settled(is_split=listing.layout.is_split))


def _extended(old: Manifest, options: Options, *, is_split: bool) -> Options:
    """Return the options with the rule, seed and fractions of the set that is extended.

    Raises:
        SourceError: one of the two sets is not split by fractions, or options contradict the old set.
    """
    recorded = old.recipe.get("options", {})
    rule = recorded.get("split_rule", "hash")
    own = options.fractions or options.split_seed or options.group_rule or options.folds
    if is_split or not recorded or (options.split_rule or rule) != rule or own:
        raise SourceError(
            f"--extend {old.where} was given with images that are already split, with other options for the split, or "
            "with a set that was indexed",
            "images would move from one split to another",
            "leave the options out: the new set has the rule, seed, fractions, groups and folds of the old one",
        )
    group = options.group_near_duplicates
    return replace(
        groups_of_old(options, old),
        split_rule=rule,
        split_seed=recorded["split_seed"],
        fractions=recorded["fractions"] and splits.check_fractions(recorded["fractions"], may_lack_train=True),
        group_near_duplicates=recorded["group_near_duplicates"] if group is None else group,
    )


def find_finished(job: Job) -> Manifest | None:
    """Return the finished set of a recipe that draws its images. They are not drawn: the recipe identifies them."""
    if not (job.out / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.load(job.out)
    described = {key: value for key, value in manifest.recipe.items() if key != "inputs_sha256"}
    if described != job.described() or manifest.bins != dict(job.bins):
        return None
    check_files(manifest)
    return manifest


def _load_finished(job: Job, identity: str, num_images: int) -> Manifest:
    manifest = Manifest.load(job.out)
    if manifest.recipe.get("inputs_sha256") != identity:
        raise ShardError(
            f"{job.out} holds a finished set of other images or other options (given: {num_images:,} images)",
            "it would be lost, and runs that were trained on it could no longer be reproduced",
            "give another --out, or --overwrite to replace it",
        )
    check_files(manifest)
    print(f"{job.out} was already made from these {num_images:,} images with these options: nothing to do")
    return manifest


@contextmanager
def work_folder(out: Path, *, shared: bool = False) -> Iterator[Path]:
    """Lock the hidden folder for journals. It is kept only if a set was started and is not finished.

    One process holds it, or any number of processes that each make a part (`shared`). Those leave the cleanup to the
    last step.
    """
    work = out / WORK_NAME
    with storage("creating the folder of the set", out):
        make_folder(work)
        lock = (work / "lock").open("a+")  # readable: network file systems require that for a shared lock
    with lock:
        lock_file = LockFile(work / "lock")
        while not (is_locked := try_lock_or_announce(lock.fileno(), lock_file, str(out), print, shared=shared)):
            if lock_file.is_decided:
                break
            time.sleep(1)  # a process of another machine may have ended
        if not is_locked:
            raise ShardError(
                f"another `wasteddp shard` is writing {out}",
                "two processes would overwrite each other's files",
                "wait for it to end",
            )
        try:
            yield work
        finally:
            lock_file.release()
            if not shared and ((out / MANIFEST_NAME).exists() or not (work / BEGUN_NAME).exists()):
                shutil.rmtree(work, ignore_errors=True)
                if not any(out.iterdir()):
                    out.rmdir()


def prepare_folder(job: Job, work: Path, *, overwrite: bool) -> None:
    """Mark the set as started, and remove the manifest of the old set if there is one.

    The manifest is removed first, so that a kill never leaves the manifest of an incomplete set.

    Raises:
        ShardError: without `overwrite`, the folder holds files that would be replaced.
    """
    out, begun = job.out, work / BEGUN_NAME
    if not begun.exists() and not overwrite:
        there = [path.name for path in out.iterdir() if _OWN_FILE.fullmatch(path.name)]
        if there:
            raise ShardError(
                f"{out} holds {len(there)} file(s) that this would replace, such as {min(there)}, and no manifest",
                "they are not from an unfinished run and may still be needed",
                f"give another --out, use them with `wasteddp index {out}`, or replace them with --overwrite",
            )
    with storage("removing the old manifest", out):
        write_atomically(begun, (job.options.split_rule or "").encode(), shared=True)
        if (out / MANIFEST_NAME).exists():
            (out / MANIFEST_NAME).unlink(missing_ok=True)  # or by another part, at the same time
            sync_folder(out)


def remove_own_files(out: Path, keep: set[str]) -> None:
    """Remove shards and indexes that an earlier, different run left, except `keep`. Other files stay."""
    with storage("removing files of an earlier run", out):
        for path in out.iterdir():
            if _OWN_FILE.fullmatch(path.name) and path.name not in keep:
                path.unlink()


def check_files(manifest: Manifest) -> None:
    """Check that each shard exists with the size in the manifest.

    Raises:
        ShardError: a shard or its index is missing, or a shard has another size.
    """
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        path = manifest.folder / shard.tar
        found = path.stat().st_size if path.exists() else 0
        if found != shard.num_bytes or not (manifest.folder / shard.index).exists():
            raise ShardError(
                f"{path} or its index is missing or changed: {found:,} bytes, the manifest says {shard.num_bytes:,}",
                "the set is damaged",
                "make it again with --overwrite; `wasteddp verify` lists all damage",
            )
