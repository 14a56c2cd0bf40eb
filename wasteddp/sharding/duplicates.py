"""Byte-identical images: which copy is kept, and which are left out. Near ones are `near_duplicates`."""

from __future__ import annotations

from collections.abc import Sequence

from wasteddp.data.manifest import LeftOut
from wasteddp.sharding.sources.layout import SPLITS, Picture


def leave_out_copies(
    pictures: Sequence[Picture], sha256s: Sequence[bytes], *, keep_conflicts: bool
) -> tuple[list[int], list[LeftOut]]:
    """Of each content one image, or none where its copies stand under different classes.

    The copy kept is the one in test, else in val, else the first by path: what is measured on must not be in train.
    With `keep_conflicts` the first by path is kept, under its class.

    Returns:
        indices of the images kept, ascending; the others, with reason `duplicate` or `conflicting_label`.
    """
    copies: dict[bytes, list[int]] = {}
    for index, sha256 in enumerate(sha256s):
        copies.setdefault(sha256, []).append(index)
    kept: list[int] = []
    left_out: list[LeftOut] = []
    for same in copies.values():
        conflict = len({pictures[index].class_name for index in same}) > 1
        if len(same) == 1:
            kept += same
        elif conflict and not keep_conflicts:
            for index in same:
                others = ", ".join(f"{pictures[i].file.path} ({pictures[i].class_name})" for i in same if i != index)
                left_out.append(LeftOut(pictures[index].file.path, "conflicting_label", f"same bytes as {others}"))
        else:
            best = same[0] if conflict else max(same, key=lambda i: (_strictness(pictures[i]), -i))
            kept.append(best)
            detail = f"same bytes as {pictures[best].file.path}, which is kept"
            reason = "conflicting_label" if conflict else "duplicate"
            left_out += [LeftOut(pictures[i].file.path, reason, detail) for i in same if i != best]
    return sorted(kept), sorted(left_out, key=lambda left: left.source)


def _strictness(picture: Picture) -> int:
    return SPLITS.index(picture.split) if picture.split else 0
