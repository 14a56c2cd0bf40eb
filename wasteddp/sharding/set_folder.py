"""The folder of a shard set while it is being made: who may write there, what may be replaced, what is cleaned up."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wasteddp.data.manifest import MANIFEST_NAME, Manifest
from wasteddp.errors import ShardError, storage
from wasteddp.files import sync_folder, try_lock

WORK_NAME = ".sharding"
_BEGUN_NAME = "begun"  # from here on, what lies in the set's folder under our names is ours
_OWN_FILE = re.compile(r"(train|val|test)-\d{6}\.(tar|idx)(\.tmp)?|manifest\.json\.tmp")


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
