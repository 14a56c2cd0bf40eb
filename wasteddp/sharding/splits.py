"""Assign images to splits, by fractions or by list files. Pure functions of names and content hashes.

Splitting by fractions depends only on an image's content: u = hash(seed, sha256) in [0, 1) is in one of the intervals.
Images that are added later therefore never move existing ones, and every class is split alike in expectation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wasteddp.errors import SourceError
from wasteddp.files import expand_home, read_text
from wasteddp.sharding.sources.layout import SPLIT_WORDS, SPLITS, Layout, SourceImage

_LABELLED_LINE = re.compile(r"(.*[^\s,;])[\s,;]+(\d+)")  # glass/a.jpg 3
DEFAULT_FRACTIONS = (0.7, 0.15, 0.15)


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Return three fractions for train, val and test that add up to 1.

    Raises:
        SourceError: there are not three, they do not add up to 1, or one is out of range.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        raise SourceError(
            f"the fractions {', '.join(f'{f:g}' for f in fractions)} add up to {sum(fractions):g}",
            "they do not assign each image to one split",
            "give three that add up to 1, for train, val and test: 0.7,0.15,0.15 (val or test may be 0, train may not)",
        )
    return fractions[0], fractions[1], fractions[2]


def unit_interval(seed: int, sha256: bytes) -> float:
    """Return the position of an image in [0, 1): 64 bits of sha256("seed:" + content hash)."""
    return int.from_bytes(hashlib.sha256(b"%d:" % seed + sha256).digest()[:8], "big") / 2**64


def by_fractions(sha256s: Sequence[bytes], fractions: Sequence[float], *, seed: int) -> list[str]:
    """Return the split of each image, which depends only on its own hash."""
    edge_val, edge_test = fractions[0], fractions[0] + fractions[1]
    if fractions[2] == 0:
        edge_test = 1.0  # 0.7 + 0.3 may be 0.999..., but a split of fraction 0 must stay empty
    places = (unit_interval(seed, sha256) for sha256 in sha256s)
    return ["train" if u < edge_val else "val" if u < edge_test else "test" for u in places]


def group_splits(splits: Sequence[str], sha256s: Sequence[bytes], pairs: npt.NDArray[np.int64]) -> list[str]:
    """Return splits that keep each chain of near-duplicates together: in the split of its smallest content hash.

    Args:
        pairs: [P, 2] indices of images that are near-duplicates.
    """
    root = list(range(len(splits)))

    def find(item: int) -> int:
        while root[item] != item:
            root[item] = root[root[item]]
            item = root[item]
        return item

    for first, second in pairs.tolist():
        low, high = sorted((find(first), find(second)), key=lambda item: sha256s[item])
        root[high] = low
    return [splits[find(item)] for item in range(len(splits))]


@dataclass(frozen=True, slots=True)
class ListedImage:
    """One line of a list file: `glass1.jpg 3`."""

    name: str
    label_number: int | None
    split: str
    place: str  # file and line, for messages


def find_list_files(folder: Path) -> dict[str, Path]:
    """Find the list files in a folder: `*train*.txt`, `*val*.txt`, `*test*.txt`; at most one of each, at least train.

    Raises:
        SourceError: there are several for one split, or there is none for train.
    """
    found: dict[str, Path] = {}
    for split in SPLITS:
        files = sorted(file for file in folder.glob("*.txt") if split in file.stem.lower())
        if len(files) > 1:
            raise SourceError(
                f"{folder} holds {len(files)} lists for {split}: {', '.join(file.name for file in files)}",
                "it is not clear which list is meant",
                "name the files: --split-files train=FILE val=FILE test=FILE",
            )
        if files:
            found[split] = files[0]
    if "train" not in found:
        raise SourceError(
            f"{folder} holds no *train*.txt",
            "there would be nothing to train on",
            "name the files: --split-files train=FILE val=FILE test=FILE",
        )
    return found


def parse_split_files(arguments: Sequence[str]) -> dict[str, Path]:
    """Parse `--split-files`: one folder, or `train=FILE val=FILE test=FILE`.

    Raises:
        SourceError: the arguments have another form.
    """
    if len(arguments) == 1 and Path(expand_home(arguments[0])).is_dir():
        return find_list_files(Path(expand_home(arguments[0])))
    pairs = [argument.partition("=") for argument in arguments]
    words = [SPLIT_WORDS.get(word) for word, _, _ in pairs]
    if not all(file for _, _, file in pairs) or None in words or len(set(words)) < len(words) or "train" not in words:
        raise SourceError(
            f"--split-files {' '.join(arguments)} is neither a folder nor train=FILE [val=FILE] [test=FILE]",
            "the splits are not known",
            f"give each split once, train at least; known words: {', '.join(SPLIT_WORDS)}",
        )
    return {str(word): Path(expand_home(file)) for word, (_, _, file) in zip(words, pairs, strict=True)}


def read_list_files(files: Mapping[str, Path]) -> list[ListedImage]:
    """Read all lines of all lists. The label number is optional and may start at 0 or 1; it must only be consistent."""
    listed: list[ListedImage] = []
    for split, file in files.items():
        for number, line in enumerate(read_text(file, "reading the list of a split").splitlines(), start=1):
            if line.strip():
                labelled = _LABELLED_LINE.fullmatch(line.strip())
                name, label = (labelled[1], int(labelled[2])) if labelled else (line.strip(), None)
                listed.append(ListedImage(name, label, split, f"{file.name}:{number}"))
    return listed


def apply_lists(layout: Layout, listed: Sequence[ListedImage]) -> tuple[Layout, list[str], list[ListedImage]]:
    """Give each image the split of its line.

    Returns:
        The layout of the listed images; the paths of images that are in no list; the lines without an image.

    Raises:
        SourceError: a name is in two lines or matches two images, or a label number belongs to two classes.
    """
    by_name: dict[str, list[SourceImage]] = {}
    for image in layout.images:
        name = image.file.path.rsplit("/", 1)[-1]
        for key in {name, f"{image.class_name}/{name}", image.file.path}:
            by_name.setdefault(key, []).append(image)
    lines: dict[str, ListedImage] = {}
    missing: list[ListedImage] = []
    for line in listed:
        fitting = by_name.get(line.name) or by_name.get(line.name.replace("\\", "/").removeprefix("./"), [])
        if len(fitting) > 1:
            raise SourceError(
                f"{line.place}: {line.name} may be {fitting[0].file.path} or {fitting[1].file.path}",
                "the wrong image could be put into a split",
                "write class/name in the lists",
            )
        if not fitting:
            missing.append(line)
            continue
        first = lines.setdefault(fitting[0].file.path, line)
        if first is not line:
            raise SourceError(
                f"{line.name} is listed twice: {first.place} ({first.split}) and {line.place} ({line.split})",
                "the same image would be counted twice, or leak from one split into another",
                "remove one of the lines",
            )
    images = [replace(p, split=lines[p.file.path].split) for p in layout.images if p.file.path in lines]
    _check_label_numbers(images, lines)
    not_listed = [image.file.path for image in layout.images if image.file.path not in lines]
    return replace(layout, images=tuple(images)), not_listed, missing


def _check_label_numbers(images: Sequence[SourceImage], lines: Mapping[str, ListedImage]) -> None:
    class_of: dict[int, tuple[str, ListedImage]] = {}
    number_of: dict[str, tuple[int, ListedImage]] = {}
    for image in images:
        line = lines[image.file.path]
        if line.label_number is None:
            continue
        class_name, first = class_of.setdefault(line.label_number, (image.class_name, line))
        number, earlier = number_of.setdefault(image.class_name, (line.label_number, line))
        if class_name != image.class_name or number != line.label_number:
            other = first if class_name != image.class_name else earlier
            raise SourceError(
                f"{line.place}: {line.name} is in the folder {image.class_name} and has the label number "
                f"{line.label_number}; {other.place} says {other.name} is {other.label_number}, "
                f"which is in the folder {class_name if other is first else image.class_name}",
                "one of the two is in the wrong class",
                "fix the list or move the image",
            )
