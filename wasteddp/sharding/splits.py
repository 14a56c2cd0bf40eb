"""Assign images to splits, by fractions or by list files. Pure functions of names and content hashes.

There are two rules for fractions. Both place an image by its content: u = hash(seed, sha256) in [0, 1).
    hash         u is in one of three intervals. Images that are added later never move existing ones, but every class
                 is split alike only in expectation: of 40 images, 23 may be in train.
    stratified   the images of each class are sorted by u; the first 70 % are train, the next 15 % val. Every class has
                 its fractions. Images that are added later can move existing ones near the two edges, unless their
                 splits are kept (`kept`).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wasteddp.errors import SourceError, visible
from wasteddp.files import expand_home, read_text
from wasteddp.sharding.sources.layout import SPLIT_WORDS, SPLITS, Layout, SourceImage, split_words

_LABELLED_LINE = re.compile(r"(.*[^\s,;])[\s,;]+(\d{1,9})")  # glass/a.jpg 3
DEFAULT_FRACTIONS = (0.7, 0.15, 0.15)
RULES = ("stratified", "hash")


def check_fractions(fractions: Sequence[float], *, may_lack_train: bool = False) -> tuple[float, float, float]:
    """Return three fractions for train, val and test that add up to 1.

    Raises:
        SourceError: there are not three, they do not add up to 1, or one is out of range.
    """
    given = f"the fractions are {', '.join(f'{f:g}' for f in fractions)}"
    if len(fractions) == 2 and min(fractions) > 0 and abs(sum(fractions) - 1) <= 1e-6:
        first, second = (f"{f:g}" for f in fractions)
        raise SourceError(
            f"{given}: two numbers",
            "the fraction of the third split is not known",
            f"give three, for train, val and test: {first},{second},0 without a test split, or {first},0,{second} "
            "without a val split",
        )
    train_is_wrong = fractions[0] == 0 and not may_lack_train if fractions else True
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or train_is_wrong:
        raise SourceError(
            f"{given}: {len(fractions)} number(s), which add up to {sum(fractions):g}",
            "they do not assign each image to one split",
            "give three that add up to 1, for train, val and test: 0.7,0.15,0.15 (val or test may be 0, train may not)",
        )
    return fractions[0], fractions[1], fractions[2]


def without_test(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Return the fractions of train and val among themselves, if the test split is given otherwise."""
    inside = fractions[0] + fractions[1]
    return (fractions[0] / inside, fractions[1] / inside, 0.0) if inside else (1.0, 0.0, 0.0)


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


def group_splits(splits: Sequence[str], sha256s: Sequence[bytes], chains: npt.NDArray[np.int64]) -> list[str]:
    """Return splits that keep each chain of near-duplicates together: in the split of its smallest content hash.

    Args:
        chains: [N] a number for each image, the same for all images of a chain.
    """
    smallest = {members[0]: members for members in members_of(sha256s, chains)}
    split_of = {image: splits[first] for first, members in smallest.items() for image in members}
    return [split_of[image] for image in range(len(splits))]


def stratified(
    classes: Sequence[str],
    sha256s: Sequence[bytes],
    chains: npt.NDArray[np.int64],
    fractions: Sequence[float],
    *,
    seed: int,
    kept: Mapping[int, str],
) -> list[str]:
    """Return the split of each image: each class has its fractions, and each chain of near-duplicates is in one split.

    A chain counts for the class of its smallest content hash. A chain of more images than val and test should have goes
    to train: it shows one object, so an evaluation on it would mean little. A split of a fraction above 0 has at least
    one image of each class, train first, where the class has enough chains.

    Args:
        kept: images that have a split already, and so has their chain: if it has several, the last of train, val, test.
    """
    split_of = [""] * len(classes)
    of_class: dict[str, list[list[int]]] = {}
    for members in members_of(sha256s, chains):
        of_class.setdefault(classes[members[0]], []).append(members)
    for chains_of_class in of_class.values():
        chains_of_class.sort(key=lambda members: unit_interval(seed, sha256s[members[0]]))
        for split, placed in _place(chains_of_class, fractions, kept).items():
            for image in (image for members in placed for image in members):
                split_of[image] = kept.get(image, split)
    return split_of


def members_of(sha256s: Sequence[bytes], chains: npt.NDArray[np.int64]) -> list[list[int]]:
    """Return the images of each chain, those with the smallest content hash first."""
    members: dict[int, list[int]] = {}
    for image, chain in sorted(enumerate(chains.tolist()), key=lambda item: sha256s[item[0]]):
        members.setdefault(chain, []).append(image)
    return list(members.values())


def _place(
    chains: Sequence[list[int]], fractions: Sequence[float], kept: Mapping[int, str]
) -> dict[str, list[list[int]]]:
    """Return the chains of each split. `chains` are those of one class, in the order of u."""
    wanted = _sizes(sum(map(len, chains)), fractions)
    placed: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
    free = []
    for members in chains:
        splits = {kept[image] for image in members if image in kept}
        if splits:
            placed[max(splits, key=SPLITS.index)].append(members)
        elif fractions[0] > 0 and len(members) > max(1, *wanted[1:]):
            placed["train"].append(members)
        else:
            free.append(members)
    left = [max(0, size - sum(map(len, placed[split]))) for split, size in zip(SPLITS, wanted, strict=True)]
    num_free = sum(map(len, free))
    if num_free:
        left = _sizes(num_free, [size / sum(left) for size in left])
    position = 0.0
    for members in free:
        middle = position + len(members) / 2
        placed["train" if middle < left[0] else "val" if middle < left[0] + left[1] else "test"].append(members)
        position += len(members)
    _give_each_split_one(placed, [split for split, f in zip(SPLITS, fractions, strict=True) if f > 0], kept)
    return placed


def _sizes(num_images: int, fractions: Sequence[float]) -> list[int]:
    """Return how many images each split should have, in whole numbers that add up."""
    edge_val = int(fractions[0] * num_images + 0.5)
    edge_test = int((fractions[0] + fractions[1]) * num_images + 0.5) if fractions[2] > 0 else num_images
    return [edge_val, edge_test - edge_val, num_images - edge_test]


def _give_each_split_one(placed: dict[str, list[list[int]]], wanted: Sequence[str], kept: Mapping[int, str]) -> None:
    """Move the smallest chain of the fullest split to each split that has none; train takes even the last one."""
    for split in sorted(wanted, key=("train", "test", "val").index):
        for other in sorted(wanted, key=lambda other: -sum(map(len, placed[other]))):
            movable = [members for members in placed[other] if not any(image in kept for image in members)]
            if not placed[split] and movable and len(placed[other]) > (split != "train"):
                smallest = min(reversed(movable), key=len)  # of equal ones, the nearest to the edge
                placed[other].remove(smallest)
                placed[split].append(smallest)


def check_sizes(
    split_of: Sequence[str],
    classes: Sequence[str],
    fractions: Sequence[float],
    *,
    largest_chain: int,
    least: int,
    has_groups: bool = False,
) -> None:
    """Check that no split of a fraction above 0 is empty or has fewer than `least` images of a class.

    Raises:
        SourceError: one is.
    """
    wanted = [split for split, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0]
    counts = Counter(zip(split_of, classes, strict=True))
    sizes = ", ".join(f"{split} {split_of.count(split):,}" for split in wanted)
    empty = [split for split in wanted if split not in split_of]
    if empty:
        why = "in one group, or joined to it by near-duplicates, and" if has_groups else "near-duplicates, which"
        alike = f"; {largest_chain:,} of them are {why} stay in one split" if largest_chain > 1 else ""
        raise SourceError(
            f"of {len(split_of):,} images, {' and '.join(empty)} would have none ({sizes}){alike}",
            "a model could not be trained, or not be judged on images that it has not seen",
            "add images; or give splits that suit them, such as days or places, with --split-files; or other fractions "
            "(1,0,0: train alone); or --no-group-near-duplicates, after which results on these splits mean little",
        )
    few = [
        f"{visible(name)} in {split}: {n}"
        for split in wanted
        for name in sorted(set(classes))
        if (n := counts[split, name]) < least
    ]
    if few:
        raise SourceError(
            f"fewer than {least} images of a class in a split: {'; '.join(few)}",
            f"--least-per-class {least} asks for at least that many",
            "add images of these classes, or give other fractions or a smaller number",
        )


@dataclass(frozen=True, slots=True)
class ListedImage:
    """One line of a list file: `glass1.jpg 3`."""

    name: str
    label_number: int | None
    split: str
    place: str  # file and line, for messages


def find_list_files(folder: Path) -> dict[str, Path]:
    """Find the list files in a folder: those with a word such as train, val or test in their names, at least train.

    Raises:
        SourceError: there are several for one split, or there is none for train.
    """
    found: dict[str, Path] = {}
    for split in SPLITS:
        files = sorted(file for file in folder.glob("*.txt") if split in split_words(file.stem))
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
            f"{folder} holds no .txt file with the word train in its name",
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
