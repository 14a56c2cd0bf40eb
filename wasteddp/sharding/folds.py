"""Divide groups of images into splits or folds, so that each has about its fraction of every class.

Source: the greedy rule of scikit-learn's StratifiedGroupKFold: the groups whose classes are most uneven come first, and
each goes where the shares of the classes are then most even. Fractions may differ here: a share is relative to the
fraction, and the standard deviation over the parts is weighted by it. With equal fractions the choices are the same,
except between parts that are equally good up to rounding: here the least full one is taken.

Legend: G groups, K classes, F parts (splits or folds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from wasteddp.errors import SourceError

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


def fold_names(num_folds: int) -> list[str]:
    return [f"fold-{number}" for number in range(num_folds)]


def divide(counts_GK: I64, fractions: Sequence[float], *, fixed: Mapping[int, int] | None = None) -> list[int]:
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
    chosen = divide(counts_GK, [fractions[number] for number in used], fixed=fixed)
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
