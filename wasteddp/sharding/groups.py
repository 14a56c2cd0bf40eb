"""Groups of images that must stay in one split: those of a site, a camera, a session or an object.

A group is named by a column of the CSV, by a folder of the path, or by a part of the path that a pattern finds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from wasteddp.data.dataset import Groups
from wasteddp.data.manifest import Split
from wasteddp.errors import SourceError
from wasteddp.sharding.folds import I64
from wasteddp.sharding.sources.layout import Layout, SourceImage

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
