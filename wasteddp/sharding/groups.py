"""Groups of images that must stay in one split, and how they are divided into splits or folds.

A group is the images of a site, a camera, a session or an object. It is named by a column of the CSV, by a folder of
the path, or by a part of the path that a pattern finds. Groups are divided so that each part has about its fraction of
every class.

Source: the greedy rule of scikit-learn's StratifiedGroupKFold: the groups whose classes are most uneven come first, and
each goes where the shares of the classes are then most even. Fractions may differ here: a share is relative to the
fraction, and the standard deviation over the parts is weighted by it. With equal fractions the choices are the same,
except between parts that are equally good up to rounding: here the least full one is taken.

Legend: N images, G groups, K classes, F parts (splits or folds).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from wasteddp.data.dataset import Groups
from wasteddp.data.manifest import Split, fold_name
from wasteddp.errors import SourceError
from wasteddp.sharding.sources.layout import Layout, SourceImage

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

_MAX_NAMED = 5


def describe_rule(column: str, level: int, pattern: str) -> str:
    """Return how groups are found, for the manifest; '' if there are none."""
    return f"column {column}" if column else f"folder level {level}" if level else f"pattern {pattern}" * bool(pattern)


def check_rule(column: str, level: int, pattern: str, *, leave_out: Sequence[str]) -> None:
    """Check the options of groups.

    Raises:
        SourceError: several are given, the pattern is not a regular expression, or a group is left out without them.
    """
    if sum(map(bool, (column, level, pattern))) > 1:
        raise SourceError(
            "more than one of --group-column, --group-level and --group-pattern is given",
            "an image would have two groups",
            "give one of them",
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise SourceError(
            f"--group-pattern {pattern!r} is not a regular expression: {error}",
            "the groups of the images are not known",
            r"write one such as '^(?P<site>[^/]+)/' or 'camera(\d+)'",
        ) from error
    if leave_out and not (column or level or pattern):
        raise SourceError(
            f"--leave-out {leave_out[0]} is given without groups",
            "it is not known which images belong to it",
            "add --group-column, --group-level or --group-pattern",
        )


def assign_groups(layout: Layout, level: int, pattern: str) -> Layout:
    """Return the layout with the group of each image, from its path.

    Args:
        level: of the folder that names the group: 1 is the outermost folder of the path, -1 the innermost; 0: none.
        pattern: a regular expression that is searched in the path. The group is its first named part, or its first
            part in brackets, or all that it matches.

    Raises:
        SourceError: an image has no such folder, or the pattern is not found in its path.
    """
    if not level and not pattern:
        return layout
    compiled = re.compile(pattern)

    def group(path: str) -> str:
        if level:
            folders = path.split("/")[:-1]
            return folders[level - 1 if level > 0 else level].strip() if abs(level) <= len(folders) else ""
        found = compiled.search(path)
        if not found:
            return ""
        return (found[min(compiled.groupindex.values(), default=min(1, compiled.groups))] or "").strip()

    groups = [group(image.file.path) for image in layout.images]
    without = [image.file.path for image, name in zip(layout.images, groups, strict=True) if not name]
    if without:
        raise SourceError(
            f"{len(without):,} of {len(groups):,} images have no group by "
            f"{describe_rule('', level, pattern)}, such as {without[0]}",
            "they could be in another split than the rest of their group",
            "give a level or a pattern that every path has"
            + ("; 1 is the outermost folder, -1 the innermost" if level else ""),
        )
    images = tuple(replace(image, group=name) for image, name in zip(layout.images, groups, strict=True))
    return replace(layout, images=images)


def refuse_divided(images: Sequence[SourceImage]) -> None:
    """Check that the given splits do not divide a group.

    Raises:
        SourceError: a group has images in two splits.
    """
    first: dict[str, SourceImage] = {}
    divided = dict[str, tuple[SourceImage, SourceImage]]()
    for image in images:
        other = first.setdefault(image.group, image)
        if image.group and other.split != image.split:
            divided.setdefault(image.group, (other, image))
    if divided:
        group, (one, other) = min(divided.items())
        raise SourceError(
            f"{len(divided)} group(s) are in two splits: {', '.join(sorted(divided)[:_MAX_NAMED])}; of {group}, "
            f"{one.file.path} is in {one.split} and {other.file.path} in {other.split}",
            "a test on images of a group that was trained on says little about new groups",
            "move each group into one split, or split by fractions, or leave the option of groups out",
        )


def find_left_out(names: Collection[str], leave_out: Sequence[str], rule: str) -> set[str]:
    """Return the groups that `--leave-out` names: B, or site=B where site is the name of the column or the pattern.

    Raises:
        SourceError: there is no such group.
    """
    found = set[str]()
    named = re.search(r"^column (.+)|\(\?P<(\w+)>", rule)
    kind = (named[1] or named[2]).lower() if named else ""
    for text in leave_out:
        word, _, value = text.partition("=")
        group = text if text in names else value if word.lower() == kind or not kind else ""
        if group not in names:
            known = sorted(names)
            more = f" and {len(known) - _MAX_NAMED} more" if len(known) > _MAX_NAMED else ""
            raise SourceError(
                f"--leave-out {text}: there is no such group; by {rule} the groups are "
                f"{', '.join(known[:_MAX_NAMED])}{more}",
                "the test split would not be the one asked for",
                f"name one of them: --leave-out {known[0]}",
            )
        found.add(group)
    return found


def numbers_of(images: Sequence[SourceImage]) -> I64:
    """Return a number for each image, the same for all images of a group: int64 [N]."""
    _, numbers = np.unique([image.group for image in images], return_inverse=True)
    return numbers.astype(np.int64)


def groups_of_set(
    splits: Mapping[str, Split], members: Mapping[str, Sequence[int]], images: Sequence[SourceImage], rule: str
) -> Groups:
    """Return the groups of a set that has just been written.

    Args:
        members: of each split, in the order of its shards.
    """
    names = sorted({images[i].group for indices in members.values() for i in indices})
    number_of = {name: number for number, name in enumerate(names)}
    of_tar = dict[str, np.ndarray[tuple[int], np.dtype[np.int32]]]()
    for name, split in splits.items():
        numbers = np.array([number_of[images[i].group] for i in members[name]], np.int32)
        ends = np.cumsum([shard.num_samples for shard in split.shards])
        of_tar |= {
            shard.tar: numbers[end - shard.num_samples : end]
            for shard, end in zip(split.shards, ends.tolist(), strict=True)
        }
    return Groups(rule, tuple(names), of_tar)


def fold_names(num_folds: int) -> list[str]:
    return [fold_name(number) for number in range(num_folds)]


def divide_groups(counts_GK: I64, fractions: Sequence[float], *, fixed: Mapping[int, int] | None = None) -> list[int]:
    """Return the part of each group. A part has at least one group, if there are enough.

    Args:
        counts_GK: images of each group and class. Of equally uneven groups, the earlier one is placed first.
        fractions: of the parts, above 0; they add up to 1.
        fixed: the part of groups that have one already.
    """
    fixed = fixed or {}
    sizes_F1 = np.array(fractions)[:, None]
    totals_K = counts_GK.sum(axis=0)
    counts_GK, totals_K = counts_GK[:, totals_K > 0], totals_K[totals_K > 0]
    filled_FK = np.zeros((len(fractions), len(totals_K)))
    chosen = [fixed.get(group, -1) for group in range(len(counts_GK))]
    for group, part in fixed.items():
        filled_FK[part] += counts_GK[group]
    num_images: list[int] = filled_FK.sum(axis=1).astype(int).tolist()
    sizes_G = counts_GK.sum(axis=1).tolist()
    is_single = counts_GK.sum(axis=1) == 1
    class_of = counts_GK.argmax(axis=1).tolist()
    for group in np.argsort(-counts_GK.std(axis=1), kind="stable").tolist():
        if chosen[group] < 0:
            if is_single[group]:  # only the share of its class changes: the same choice, in a few microseconds
                held = filled_FK[:, class_of[group]].tolist()
                costs = [(2 * count + 1) / size for count, size in zip(held, fractions, strict=True)]
            else:
                costs = _unevenness(filled_FK, counts_GK[group], sizes_F1, totals_K).tolist()
            part = _least(costs, [count / size for count, size in zip(num_images, fractions, strict=True)])
            filled_FK[part] += counts_GK[group]
            num_images[part] += sizes_G[group]
            chosen[group] = part
    _fill_empty(chosen, counts_GK.sum(axis=1), len(fractions), fixed)
    return chosen


def divide_images(
    members: Sequence[Sequence[int]],
    classes: Sequence[str],
    fractions: Sequence[float],
    names: Sequence[str],
    *,
    kept: Mapping[int, str],
) -> dict[int, str]:
    """Return the part of each image. Images of one group are in one part, but for those whose part is kept.

    Args:
        members: the images of each group, in the order that decides between equal ones.
        classes: of all images.
        fractions: of the parts.
        names: of the parts; those of fraction 0 stay empty.
        kept: images that have a part; and so has their group: if it has several, the last one.
    """
    used = [number for number, fraction in enumerate(fractions) if fraction > 0]
    place = {names[number]: at for at, number in enumerate(used)}
    number_of = {name: number for number, name in enumerate(sorted(set(classes)))}
    counts_GK = np.zeros((len(members), len(number_of)), np.int64)
    fixed = dict[int, int]()
    for group, images in enumerate(members):
        for image in images:
            counts_GK[group, number_of[classes[image]]] += 1
            if image in kept:
                fixed[group] = max(fixed.get(group, 0), place.get(kept[image], 0))
    chosen = divide_groups(counts_GK, [fractions[number] for number in used], fixed=fixed)
    return {
        image: kept.get(image, names[used[part]])
        for images, part in zip(members, chosen, strict=True)
        for image in images
    }


def check_folds(fold_of: Mapping[int, str], num_folds: int, num_groups: int) -> None:
    """Check that each fold has images.

    Raises:
        SourceError: one has none.
    """
    empty = sorted(set(fold_names(num_folds)) - set(fold_of.values()))
    if empty:
        raise SourceError(
            f"--folds {num_folds} of {len(fold_of):,} images in {num_groups:,} group(s) and near-duplicates that stay "
            f"together: {', '.join(empty)} would have none",
            "a model could not be judged on it",
            f"give --folds {max(2, num_groups)} or fewer, or more images or groups",
        )


def _unevenness(filled_FK: F64, counts_K: I64, sizes_F1: F64, totals_K: I64) -> F64:
    """Return [F]: if the group goes to a part, the mean over classes of the deviation of their shares."""
    num_parts = len(filled_FK)
    trials_FFK = filled_FK + np.eye(num_parts)[:, :, None] * counts_K
    shares_FFK = trials_FFK / (sizes_F1 * totals_K)
    mean_F1K = (sizes_F1 * shares_FFK).sum(axis=1, keepdims=True)
    deviation_FK: F64 = np.sqrt((sizes_F1 * (shares_FFK - mean_F1K) ** 2).sum(axis=1))
    return deviation_FK.mean(axis=1)  # type: ignore[no-any-return]


def _least(costs: Sequence[float], fill: Sequence[float]) -> int:
    """Return the part of the least cost; of equal ones, the one that is least full, then the first."""
    best = 0
    for part in range(1, len(costs)):
        is_equal = abs(costs[part] - costs[best]) <= 1e-9 * max(abs(costs[best]), 1e-9)
        if (fill[part] < fill[best]) if is_equal else (costs[part] < costs[best]):
            best = part
    return best


def _fill_empty(chosen: list[int], sizes_G: I64, num_parts: int, fixed: Mapping[int, int]) -> None:
    """Move the smallest group of the fullest part to each part that has none. The first part is served first."""
    for part in (part for part in range(num_parts) if part not in chosen):
        sizes = np.bincount(chosen, sizes_G, minlength=num_parts) if chosen else np.zeros(num_parts)
        for other in np.argsort(-sizes, kind="stable").tolist():
            groups = [group for group, its in enumerate(chosen) if its == other]
            movable = [group for group in groups if group not in fixed]
            if movable and len(groups) > 1:
                chosen[min(movable, key=lambda group: (sizes_G[group], -group))] = part
                break
