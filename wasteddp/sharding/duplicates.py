"""Find byte-identical images and near-duplicates.

Of byte-identical images one copy is kept. Near-duplicates are pairs of images whose perceptual hashes are within a
distance; they are found without comparing every image with every other.

A hash has two parts, both the signs of DCT coefficients against their median: 64 bits (8x8 lowest frequencies) find
candidates and 256 bits (16x16) confirm them. 64 bits alone are not enough for small objects on a white background: of
TrashNet's 45 pairs within 6 bits, a dozen show different objects, and all of these differ in 52 or more of the 256
bits, while the 31 pairs within 48 bits all show one object, photographed twice. The number found is a lower bound: an
object that was turned or moved between two photographs is not found. The arithmetic is exact in whole numbers, so the
same pixels give the same hash on every machine.

Source: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010); Norouzi et al., Fast Search
in Hamming Space with Multi-Index Hashing (CVPR 2012).

Legend: N images, U different 64-bit hashes, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from wasteddp.data.decoding.decode import GreyHW
from wasteddp.data.manifest import LeftOut
from wasteddp.sharding.sources.layout import SPLITS, SourceImage

DEFAULT_DISTANCE = 8  # bits of 64
MAX_DISTANCE = 11  # above it the search looks up too many neighbours of each band, and most pairs are chance
CONFIRMED_DISTANCE = 48  # bits of 256

_SIDE_PX = 32
_BANDS, _BAND_BITS = 4, 16
_CHUNK = 1 << 20  # candidate pairs held at a time

_frequency, _pixel = np.mgrid[0:16, 0:_SIDE_PX]
_DCT = np.round(np.cos(np.pi * (2 * _pixel + 1) * _frequency / (2 * _SIDE_PX)) * 4096)  # [16, 32], whole numbers


def leave_out_copies(
    images: Sequence[SourceImage], sha256s: Sequence[bytes], *, keep_conflicts: bool
) -> tuple[list[int], list[LeftOut]]:
    """Keep one image of each content, or none if its copies have different classes.

    The copy in test is kept, otherwise the one in val, otherwise the first by path: an image that is evaluated must not
    be in train. With `keep_conflicts`, the first by path is kept with its class.

    Returns:
        Indices of the kept images, ascending; the images left out, with reason `duplicate` or `conflicting_label`.
    """
    copies: dict[bytes, list[int]] = {}
    for index, sha256 in enumerate(sha256s):
        copies.setdefault(sha256, []).append(index)
    kept: list[int] = []
    left_out: list[LeftOut] = []
    for same in copies.values():
        conflict = len({images[index].class_name for index in same}) > 1
        if len(same) == 1:
            kept += same
        elif conflict and not keep_conflicts:
            for index in same:
                others = ", ".join(f"{images[i].file.path} ({images[i].class_name})" for i in same if i != index)
                left_out.append(LeftOut(images[index].file.path, "conflicting_label", f"same bytes as {others}"))
        else:
            best = same[0] if conflict else max(same, key=lambda i: (_strictness(images[i]), -i))
            kept.append(best)
            detail = f"same bytes as {images[best].file.path}, which is kept"
            reason = "conflicting_label" if conflict else "duplicate"
            left_out += [LeftOut(images[i].file.path, reason, detail) for i in same if i != best]
    return sorted(kept), sorted(left_out, key=lambda left: left.source)


def _strictness(image: SourceImage) -> int:
    return SPLITS.index(image.split) if image.split else 0


class PerceptualHash(NamedTuple):
    bits64: int
    bits256: bytes


class NearPairs(NamedTuple):
    """`pairs[k]` are two images, the lower index first; `distances[k]` is how many of the 256 bits differ."""

    pairs: npt.NDArray[np.int64]  # [P, 2]
    distances: npt.NDArray[np.int64]  # [P]


def perceptual_hash(grey: GreyHW) -> PerceptualHash:
    """Return the perceptual hash of a grey image."""
    small = Image.fromarray(grey).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BOX)
    # Whole numbers below 255 * (32 * 4096)^2 = 2^42 are exact in float64, in whatever order BLAS adds them.
    waves = _DCT @ np.asarray(small, dtype=np.float64) @ _DCT.T  # [16 vertical, 16 horizontal]
    coarse = int.from_bytes(_signs(waves[:8, :8]), "big")
    return PerceptualHash(coarse, _signs(waves))


def find_near_pairs(
    bits64_N: npt.NDArray[np.uint64], bits256_N: npt.NDArray[np.uint8], *, distance: int = DEFAULT_DISTANCE
) -> NearPairs:
    """Return all pairs within `distance` of 64 bits that the 256 bits confirm.

    Args:
        bits64_N: uint64 [N].
        bits256_N: uint8 [N, 32].
    """
    pairs = candidate_pairs(bits64_N, distance)
    differing = np.bitwise_xor(bits256_N[pairs[:, 0]], bits256_N[pairs[:, 1]])
    distances = np.unpackbits(differing, axis=1).sum(axis=1, dtype=np.int64)
    near = distances <= CONFIRMED_DISTANCE
    return NearPairs(pairs[near], distances[near])


def candidate_pairs(bits64_N: npt.NDArray[np.uint64], distance: int) -> npt.NDArray[np.int64]:
    """Return all pairs (i < j) whose 64 bits differ in at most `distance` places: int64 [P, 2], sorted. Exact.

    Two hashes within `distance` differ in at most distance // 4 bits in at least one of four bands of 16 bits
    (pigeonhole principle). It is therefore enough to compare images with such a band, 137 of 65,536 values at the
    default.
    """
    values, inverse = np.unique(bits64_N, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(np.bincount(inverse, minlength=len(values)))
    images_U = np.split(order, ends[:-1]) if len(values) else []
    found = [np.empty((0, 2), dtype=np.int64)]
    found.extend(np.array(list(combinations(images, 2)), dtype=np.int64) for images in images_U if len(images) > 1)
    for left, right in _value_pairs(values, distance).tolist():
        found.append(np.array([(i, j) for i in images_U[left] for j in images_U[right]], dtype=np.int64))
    pairs = np.sort(np.concatenate(found), axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _value_pairs(values_U: npt.NDArray[np.uint64], distance: int) -> npt.NDArray[np.int64]:
    """Return the pairs of different values within `distance`: indices [P, 2]."""
    found = [np.empty((0, 2), dtype=np.int64)]
    for band in range(_BANDS):
        places = ((values_U >> np.uint64(band * _BAND_BITS)) & np.uint64(0xFFFF)).astype(np.int64)
        by_place = np.argsort(places, kind="stable")
        starts = np.searchsorted(places[by_place], np.arange((1 << _BAND_BITS) + 1))
        for mask in _masks(distance // _BANDS):
            wanted = places ^ mask
            first, count = starts[wanted], starts[wanted + 1] - starts[wanted]
            for rows in _chunks(count):
                left = np.repeat(rows, count[rows])
                offset = np.arange(len(left)) - np.repeat(np.cumsum(count[rows]) - count[rows], count[rows])
                right = by_place[first[left] + offset]
                near = (left < right) & (_popcount(values_U[left] ^ values_U[right]) <= distance)
                found.append(np.stack([left[near], right[near]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _masks(radius: int) -> list[int]:
    """Return all 16-bit numbers with at most `radius` bits set."""
    return [sum(1 << bit for bit in bits) for n in range(radius + 1) for bits in combinations(range(_BAND_BITS), n)]


def _chunks(count_U: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Return row numbers in runs of about `_CHUNK` candidates each."""
    run = np.cumsum(count_U) // _CHUNK
    return np.split(np.arange(len(count_U)), np.flatnonzero(np.diff(run)) + 1)


def _popcount(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    bits: npt.NDArray[np.uint8] = np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1)
    counts: npt.NDArray[np.int64] = np.sum(bits, axis=1, dtype=np.int64)
    return counts


def _signs(waves: npt.NDArray[np.float64]) -> bytes:
    """Return a bit for each wave: above the median of all waves except the mean brightness, which has no shape."""
    flat = waves.ravel()
    median = np.sort(flat[1:])[len(flat) // 2 - 1]
    return np.packbits(flat > median).tobytes()
