"""Create a manifest for tars that another tool wrote, in a folder or at a URL. The tars are not changed.

`foreign_tar` reads the tars.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from braceexpand import braceexpand

from wasteddp import __version__
from wasteddp.data.manifest import MANIFEST_NAME, Manifest, Shard, Split, write_index
from wasteddp.data.remote.folder import Patience, RemoteFolder, is_url
from wasteddp.errors import ShardError, storage
from wasteddp.parallel import in_order, progress
from wasteddp.sharding.foreign_tar import ReadTar, TarSample, read_tar
from wasteddp.sharding.scan import report_tolerated
from wasteddp.sharding.sources.layout import SPLIT_WORDS, SPLITS, check_classes

DEFAULT_LABEL_KEYS = ("label", "class", "cls", "label_name")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SPLIT_PREFIX = re.compile(rf"({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
_NAME_THEM = "if the server does not list folders, name the tars: --tars 'train-{000..146}.tar'"


def index_folder(
    folder: Path,
    *,
    workers: int,
    classes: Sequence[str] = (),
    label_keys: Sequence[str] = DEFAULT_LABEL_KEYS,
    overwrite: bool = False,
) -> Manifest:
    """Write an index next to each tar, then the manifest.

    Raises:
        ShardError: there are no tars, one is compressed, truncated or sparse, a sample has no label, or labels are
            partly names and partly numbers.
    """
    with storage("listing the tars", folder):
        names = sorted(path.name for path in folder.iterdir())
    tars = _select_tars(names, str(folder), overwrite=overwrite)
    found = _collect(in_order(lambda name: read_tar(folder / name, label_keys), tars, workers=workers), len(tars))
    return _write_set(folder, folder.resolve().name, str(folder), found, classes, label_keys)


def index_url(
    url: str,
    out: Path,
    *,
    workers: int,
    tars: str = "",
    classes: Sequence[str] = (),
    label_keys: Sequence[str] = DEFAULT_LABEL_KEYS,
    overwrite: bool = False,
) -> Manifest:
    """Index tars at a URL as `index_folder` does. Each tar is fetched into `out` once and removed after it is read.

    The indexes and the manifest are written to `out`, not to the store: users who can read a store often cannot write
    to it, and a store does not guarantee that the manifest becomes visible last. At most `workers` tars are on the disk
    at the same time.

    Args:
        tars: names of the tars, such as `train-{000..146}.tar`, for a store that does not list folders.

    Raises:
        ShardError: as for `index_folder`, or the store cannot be reached.
        SettingsError: the URL is not valid.
    """
    folder = RemoteFolder(url, Patience())
    try:
        names = _expand(tars) if tars else _list_names(folder)
        if (out / MANIFEST_NAME).exists() and not overwrite:
            raise _finished_error(str(out))
        wanted = _select_tars(names, folder.url, overwrite=overwrite)
        with storage("creating the folder for the indexes", out):
            out.mkdir(parents=True, exist_ok=True)
            work = TemporaryDirectory(prefix=".indexing-", dir=out)
        with work:
            read = partial(_fetch_tar, folder, Path(work.name), label_keys)
            found = _collect(in_order(read, wanted, workers=workers), len(wanted))
    finally:
        folder.close()
    return _write_set(out, folder.url.rpartition("/")[2], folder.url, found, classes, label_keys)


def _fetch_tar(folder: RemoteFolder, work: Path, label_keys: Sequence[str], name: str) -> ReadTar:
    path = work / name
    with storage("fetching a tar", path):
        with path.open("wb") as file:
            folder.fetch(name, file)
        found = read_tar(path, label_keys, where=f"{folder.url}/{name}")
        path.unlink()
    return found


def _expand(tars: str) -> list[str]:
    try:
        return list(braceexpand(tars))
    except ValueError as error:
        raise ShardError(f"--tars is {tars!r}: {error}", "the names of the tars are not known", _NAME_THEM) from error


def _list_names(folder: RemoteFolder) -> list[str]:
    try:
        return folder.names()
    except ShardError as error:
        raise ShardError(error.found, "the names of its tars are not known", f"check the URL; {_NAME_THEM}") from error


def _select_tars(names: Sequence[str], where: str, *, overwrite: bool) -> list[str]:
    compressed = [name for name in names if name.endswith(_COMPRESSED)]
    if compressed:
        raise ShardError(
            f"{where} holds {len(compressed)} compressed tar(s), such as {compressed[0]}",
            "a sample cannot be read from the middle of a compressed file",
            "unpack them (gunzip); compression does not make JPEGs smaller",
        )
    if MANIFEST_NAME in names and not overwrite:
        raise _finished_error(where)
    tars = [name for name in names if name.endswith(".tar") and Path(name).name == name]
    if not tars:
        raise ShardError(
            f"{where} holds no *.tar ({len(names)} other entries)",
            "there is nothing to index",
            "give the folder that holds the tars; for images use `wasteddp shard`"
            + (f"; {_NAME_THEM}" if is_url(where) else ""),
        )
    return tars


def _finished_error(where: str) -> ShardError:
    return ShardError(
        f"{where} already has a {MANIFEST_NAME}",
        "it would be replaced",
        "nothing needs to be done; to index the tars again, give --overwrite",
    )


def _collect(found: Iterable[ReadTar], total: int) -> list[ReadTar]:
    """Return all tars, with a progress bar."""
    collected = []
    with progress("indexing tars", total) as advance:
        for tar in found:
            collected.append(tar)
            advance()
    return collected


def _write_set(
    out: Path, name: str, where: str, found: Sequence[ReadTar], classes: Sequence[str], label_keys: Sequence[str]
) -> Manifest:
    """Write the indexes, then the manifest."""
    good = [sample for tar in found for sample in tar.samples if sample.problem is None]
    names = _class_names({sample.label for sample in good}, classes, where)
    number_of: dict[str | int, int] = {name: number for number, name in enumerate(names)}
    shards: dict[str, list[Shard]] = {}
    counts: dict[str, Counter[int]] = {}
    for tar in found:
        kept = [sample for sample in tar.samples if sample.problem is None]
        labels = [s.label if isinstance(s.label, int) else number_of[s.label] for s in kept]
        split = _split_of(tar.name)
        if kept:
            shards.setdefault(split, []).append(_write_index(out, tar, kept, labels))
            counts.setdefault(split, Counter()).update(labels)
    splits = {
        split: Split(split, tuple(shards[split]), tuple(counts[split][k] for k in range(len(names))))
        for split in SPLITS
        if split in shards
    }
    report_tolerated([f"{tar.name}/{s.key}" for tar in found for s in tar.samples if s.is_tolerated])
    recipe = {"indexed": "made by another tool; labels from .cls or .json", "label_keys": list(label_keys)}
    Manifest(
        folder=out,
        name=name,
        classes=names,
        splits=splits,
        left_out=tuple(s.problem for tar in found for s in tar.samples if s.problem is not None),
        recipe=recipe,
        tool=f"wasteddp {__version__}",
    ).save()
    return Manifest.load(out)


def _class_names(labels: set[str | int], classes: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the class names in order. Without `classes`, numbers are their own names: 0, 1, 2."""
    numbers = sorted(label for label in labels if isinstance(label, int))
    if not numbers:
        return check_classes({str(label) for label in labels}, classes, where)
    if len(numbers) < len(labels):
        name = min(label for label in labels if isinstance(label, str))
        raise ShardError(
            f"{where}: some labels are numbers ({numbers[0]}) and some are names ({name})",
            "one class could become two",
            "write all labels as numbers or all as names, or choose the field with --label-key",
        )
    names = tuple(classes) or tuple(str(number) for number in range(numbers[-1] + 1))
    if numbers[-1] >= len(names) or len(names) < 2:
        raise ShardError(
            f"{where} has labels up to {numbers[-1]} and {len(names)} class name(s)",
            "each label needs a name, and training needs at least two classes",
            f"name {max(numbers[-1] + 1, 2)} classes with --classes or --classes-from, starting with class 0",
        )
    return names


def _split_of(tar: str) -> str:
    match = _SPLIT_PREFIX.match(tar)
    return SPLIT_WORDS[match[1].lower()] if match else "train"


def _write_index(out: Path, tar: ReadTar, samples: Sequence[TarSample], labels: Sequence[int]) -> Shard:
    path = out / Path(tar.name).with_suffix(".idx")
    records = ((s.offset, s.length, label, s.sha256) for s, label in zip(samples, labels, strict=True))
    return Shard(
        tar=tar.name,
        index=path.name,
        num_samples=len(samples),
        num_bytes=tar.num_bytes,
        sha256=tar.sha256,
        index_sha256=write_index(path, records),
    )
