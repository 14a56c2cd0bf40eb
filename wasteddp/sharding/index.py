"""Create a manifest for tars that another tool wrote, in a folder or at a URL. The tars are not changed.

`foreign_tar` reads the tars.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from wasteddp import __version__
from wasteddp.data.manifest import MANIFEST_NAME, Manifest, Shard, Split, is_inside, write_index
from wasteddp.data.remote.folder import Patience, RemoteFolder, is_url
from wasteddp.errors import ShardError, print_line, storage
from wasteddp.files import make_folder, temporary_folder
from wasteddp.parallel import in_order, progress
from wasteddp.sharding.foreign_tar import ReadTar, TarSample, read_tar
from wasteddp.sharding.scan import report_tolerated
from wasteddp.sharding.sources.files import is_ignored
from wasteddp.sharding.sources.layout import (
    SPLIT_WORDS,
    SPLITS,
    check_classes,
    check_names,
    split_words,
    warn_of_similar,
)

DEFAULT_LABEL_KEYS = ("label", "class", "cls", "label_name")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_NAME_THEM = "if the server does not list folders, name the tars: --tars 'train-{000..146}.tar'"


def index_folder(
    folder: Path,
    *,
    workers: int,
    classes: Sequence[str] = (),
    class_names: Mapping[str, str] | None = None,
    label_keys: Sequence[str] = DEFAULT_LABEL_KEYS,
    splits: Sequence[tuple[str, str]] = (),
    overwrite: bool = False,
) -> Manifest:
    """Write an index next to each tar, then the manifest. Tars may be in the folder or in folders of splits in it.

    Args:
        class_names: other names of classes, by label.
        splits: pairs of a split and a pattern of names of tars, which have precedence over words in the names.

    Raises:
        ShardError: there are no tars, one is compressed, truncated or sparse, a sample has no label, labels are partly
            names and partly numbers, or the split of a tar is not clear.
    """
    with storage("listing the tars", folder):
        names = sorted(path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*.tar")))
    tars = _select_tars(names, str(folder), overwrite=overwrite)
    split_of = choose_splits(tars, splits, str(folder))
    found = _collect(
        in_order(lambda name: read_tar(folder / name, label_keys, name=name), tars, workers=workers), len(tars)
    )
    found = [_renamed(tar, class_names) for tar in found]
    return _write_set(
        folder, folder.resolve().name, str(folder), found, classes, _recipe(label_keys, class_names), split_of
    )


def index_url(
    url: str,
    out: Path,
    *,
    workers: int,
    tars: str = "",
    classes: Sequence[str] = (),
    class_names: Mapping[str, str] | None = None,
    label_keys: Sequence[str] = DEFAULT_LABEL_KEYS,
    splits: Sequence[tuple[str, str]] = (),
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
        split_of = choose_splits(wanted, splits, folder.url)
        with storage("creating the folder for the indexes", out):
            make_folder(out)
        with temporary_folder(out, ".indexing-", print_line) as work:
            read = partial(_fetch_tar, folder, work, label_keys)
            found = _collect(in_order(read, wanted, workers=workers), len(wanted))
    finally:
        folder.close()
    found = [_renamed(tar, class_names) for tar in found]
    name = folder.url.rpartition("/")[2]
    return _write_set(out, name, folder.url, found, classes, _recipe(label_keys, class_names), split_of)


def _fetch_tar(folder: RemoteFolder, work: Path, label_keys: Sequence[str], name: str) -> ReadTar:
    path = work / name
    with storage("fetching a tar", path):
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            folder.fetch(name, file)
        found = read_tar(path, label_keys, where=f"{folder.url}/{name}", name=name)
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
    tars = [name for name in names if name.endswith(".tar") and is_inside(name) and not is_ignored(name)]
    tars = [name for name in tars if "/" not in name] or tars
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
    out: Path,
    name: str,
    where: str,
    found: Sequence[ReadTar],
    classes: Sequence[str],
    recipe: Mapping[str, Any],
    split_of: Mapping[str, str],
) -> Manifest:
    """Write the indexes, then the manifest."""
    good = [sample for tar in found for sample in tar.samples if sample.problem is None]
    names = _class_names({sample.label for sample in good}, classes, where)
    warn_of_similar(names, where)
    number_of: dict[str | int, int] = {name: number for number, name in enumerate(names)}
    shards: dict[str, list[Shard]] = {}
    counts: dict[str, Counter[int]] = {}
    for tar in found:
        kept = [sample for sample in tar.samples if sample.problem is None]
        labels = [s.label if isinstance(s.label, int) else number_of[s.label] for s in kept]
        split = split_of[tar.name]
        if kept:
            shards.setdefault(split, []).append(_write_index(out, tar, kept, labels))
            counts.setdefault(split, Counter()).update(labels)
    splits = {
        split: Split(split, tuple(shards[split]), tuple(counts[split][k] for k in range(len(names))))
        for split in SPLITS
        if split in shards
    }
    tolerated = [f"{tar.name}/{s.key}" for tar in found for s in tar.samples if s.is_tolerated]
    report_tolerated(tolerated)
    Manifest(
        folder=out,
        name=name,
        classes=names,
        splits=splits,
        left_out=tuple(s.problem for tar in found for s in tar.samples if s.problem is not None),
        recipe=dict(recipe),
        num_tolerated=len(tolerated),
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
    check_names(names, where)
    return names


def parse_splits(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Parse the values of `--split`: NAME=GLOB."""
    parts = [argument.partition("=") for argument in arguments]
    return [(split, pattern) for split, _, pattern in parts]


def choose_splits(tars: Sequence[str], splits: Sequence[tuple[str, str]], where: str) -> dict[str, str]:
    """Return the split of each tar: the first whose pattern matches, or the one that its name has as a word.

    Without any such word in any name, all are train.

    Raises:
        ShardError: a name has words of two splits, only some names have one, or a pattern matches no tar.
    """
    for split, pattern in splits:
        if SPLIT_WORDS.get(split) is None or not any(fnmatchcase(tar, pattern) for tar in tars):
            raise ShardError(
                f"--split {split}={pattern} matches none of the {len(tars)} tars of {where}, or {split} is not a split",
                "its tars would go into another split",
                f"give --split NAME=GLOB with one of {', '.join(SPLITS)}, such as --split val='*-validation-*.tar'",
            )
    words = {
        tar: next(({SPLIT_WORDS[split]} for split, pattern in splits if fnmatchcase(tar, pattern)), split_words(tar))
        for tar in tars
    }
    unclear = [tar for tar, found in words.items() if len(found) != 1]
    if unclear and any(words.values()):
        raise ShardError(
            f"{len(unclear)} of the {len(tars)} tars of {where} have no word for one split in their names, such as "
            f"{unclear[0]}; the others have",
            "images for validation or test could be trained on",
            "rename them, or give --split NAME=GLOB, such as --split val='*-validation-*.tar' --split train='*'",
        )
    return {tar: min(found, default="train") for tar, found in words.items()}


def _renamed(tar: ReadTar, class_names: Mapping[str, str] | None) -> ReadTar:
    names = dict(class_names or {})
    samples = tuple(
        replace(s, label=names.get(s.label, s.label)) if isinstance(s.label, str) else s for s in tar.samples
    )
    return replace(tar, samples=samples)


def _recipe(label_keys: Sequence[str], class_names: Mapping[str, str] | None) -> dict[str, Any]:
    recipe = {"indexed": "made by another tool; labels from .cls or .json", "label_keys": list(label_keys)}
    return recipe | ({"class_names": dict(class_names)} if class_names else {})


def _write_index(out: Path, tar: ReadTar, samples: Sequence[TarSample], labels: Sequence[int]) -> Shard:
    name = str(Path(tar.name).with_suffix(".idx"))
    path = out / name
    if not path.parent.exists():
        make_folder(path.parent)
    records = ((s.offset, s.length, label, s.sha256) for s, label in zip(samples, labels, strict=True))
    return Shard(
        tar=tar.name,
        index=name,
        num_samples=len(samples),
        num_bytes=tar.num_bytes,
        sha256=tar.sha256,
        index_sha256=write_index(path, records),
    )
