"""Find byte-identical images and near-duplicates.

Of byte-identical images one copy is kept. Near-duplicates are pairs of images whose perceptual hashes are within a
distance; they are found without comparing every image with every other. Images that are joined by such pairs are a
chain. Of thousands of images that are all alike, as of a standing camera, most pairs are never looked at: an image
that has `MOST_PARTNERS` near-duplicates is not compared further, which still joins all of them in one chain.

A hash has two parts, both the signs of DCT coefficients against their median: 64 bits (8x8 lowest frequencies) find
candidates and 256 bits (16x16) confirm them. 64 bits alone are not enough for small objects on a white background: of
TrashNet's 45 pairs within 6 bits, a dozen show different objects, and all of these differ in 52 or more of the 256
bits, while the 31 pairs within 48 bits all show one object, photographed twice. The number found is a lower bound: an
object that was turned or moved between two photographs is not found. The arithmetic is exact in whole numbers, so the
same pixels give the same hash on every machine.

Source: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010); Norouzi et al., Fast Search
in Hamming Space with Multi-Index Hashing (CVPR 2012).

Legend: N images, P pairs, K kinds of images, such as splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
MOST_PARTNERS = 128  # of one image; up to here, all pairs are found
MOST_LISTED = 10_000

_SIDE_PX = 32
_BANDS = ((0, 22), (22, 21), (43, 21))  # first bit and number of bits
_CHUNK = 1 << 20  # candidate pairs held at a time
_LEADERS = 4  # images of one band that are always compared, so that one chain does not become several

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


class Near(NamedTuple):
    """The near-duplicates among N images of K kinds."""

    chains_N: npt.NDArray[np.int64]  # the first image of each image's chain; itself, if it has no near-duplicate
    num_pairs: int
    is_complete: bool  # else some images have more near-duplicates than were looked for, and all numbers are at least
    pairs: npt.NDArray[np.int64]  # [P, 2] of kinds that are apart, the nearest first: the lower kind, the higher kind
    distances: npt.NDArray[np.int64]  # [P] of 256 bits
    pairs_KK: npt.NDArray[np.int64]  # number of pairs of a lower and a higher kind
    images_KK: npt.NDArray[np.int64]  # number of images of the second kind with a near-duplicate of the first


def perceptual_hash(grey: GreyHW) -> PerceptualHash:
    """Return the perceptual hash of a grey image."""
    small = Image.fromarray(grey).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BOX)
    # Whole numbers below 255 * (32 * 4096)^2 = 2^42 are exact in float64, in whatever order BLAS adds them.
    waves = _DCT @ np.asarray(small, dtype=np.float64) @ _DCT.T  # [16 vertical, 16 horizontal]
    coarse = int.from_bytes(_signs(waves[:8, :8]), "big")
    return PerceptualHash(coarse, _signs(waves))


def find_near(
    bits64_N: npt.NDArray[np.uint64],
    bits256_N: npt.NDArray[np.uint8],
    kinds_N: npt.NDArray[np.int64],
    apart_KK: npt.NDArray[np.bool_],
    *,
    distance: int = DEFAULT_DISTANCE,
) -> Near:
    """Find all pairs within `distance` of 64 bits that the 256 bits confirm.

    Args:
        bits64_N: uint64 [N].
        bits256_N: uint8 [N, 32].
        kinds_N: the kind of each image, 0 .. K-1.
        apart_KK: between which kinds pairs are listed and counted, symmetric.
    """
    num_images, num_kinds = len(bits64_N), len(apart_KK)
    chains, partners = np.arange(num_images), np.zeros(num_images, np.int64)
    shown = np.zeros((num_kinds, num_images), bool)  # shown[k, i]: image i has a near-duplicate of kind k
    num_pairs, pairs_KK = 0, np.zeros((num_kinds, num_kinds), np.int64)
    listed = np.empty((0, 3), np.int64)
    fine_N = np.ascontiguousarray(bits256_N).view(np.uint64)
    for left, right in candidates(bits64_N, distance, partners):
        bits = _popcount(fine_N[left] ^ fine_N[right]).sum(axis=1)
        near = bits <= CONFIRMED_DISTANCE
        left, right, bits = left[near], right[near], bits[near]
        np.add.at(partners, left, 1)
        _join(chains, left, right)
        shown[kinds_N[right], left] = shown[kinds_N[left], right] = True
        once = left < right  # each pair is found from both its images
        num_pairs += int(once.sum())
        once &= apart_KK[kinds_N[left], kinds_N[right]]
        rows = np.stack([bits, left, right], axis=1)[once]
        turned = kinds_N[rows[:, 1]] > kinds_N[rows[:, 2]]
        rows[turned, 1:] = rows[turned, :0:-1]
        np.add.at(pairs_KK, (kinds_N[rows[:, 1]], kinds_N[rows[:, 2]]), 1)
        listed = _nearest(np.concatenate([listed, rows]))
    images_KK = np.stack([np.bincount(kinds_N[shown[kind]], minlength=num_kinds) for kind in range(num_kinds)])
    is_complete = not (partners >= MOST_PARTNERS).any()
    return Near(
        _first(chains, np.arange(num_images)), num_pairs, is_complete, listed[:, 1:], listed[:, 0], pairs_KK, images_KK
    )


def candidates(
    bits64_N: npt.NDArray[np.uint64], distance: int, partners_N: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield the pairs whose 64 bits differ in at most `distance` places, each from both its images, in parts.

    Two hashes within `distance` differ in at most (distance - b) // 3 bits in band b for at least one of three bands of
    22 and 21 bits (pigeonhole principle). It is therefore enough to compare images with such a band: at the default,
    232 of 2 million values.

    Args:
        partners_N: is read again and again: images with `MOST_PARTNERS` are not compared further.
    """
    for band, (shift, num_bits) in enumerate(_BANDS):
        places_N = _band(bits64_N, shift, num_bits)
        order = np.argsort(places_N, kind="stable")
        bits64, places = bits64_N[order], places_N[order]
        look_up = _finder(places, num_bits)
        leads = np.arange(len(places)) - look_up(places)[0] < _LEADERS
        for mask in _masks((distance - band) // len(_BANDS), num_bits):
            is_full = partners_N >= MOST_PARTNERS
            rows = np.flatnonzero(leads | ~is_full[order]) if is_full.any() else np.arange(len(places))
            (first, count), done = look_up(places[rows] ^ mask), 0
            while (more := count > done).any():
                rows, first, count = rows[more], first[more], count[more]
                width = np.minimum(count - done, MOST_PARTNERS)
                for part in _chunks(width):
                    left, begin, size = (np.repeat(a[part], width[part]) for a in (rows, first, count))
                    step = np.arange(len(left)) - np.repeat(np.cumsum(width[part]) - width[part], width[part]) + done
                    right = begin + (left - begin + 1 + step) % size  # from the next one on: neighbours are linked
                    differing = bits64[left] ^ bits64[right]
                    near = (left != right) & (_popcount(differing) <= distance)
                    for earlier, (low, size_bits) in enumerate(_BANDS[:band]):  # that band has found it
                        near &= _popcount(_band(differing, low, size_bits).astype(np.uint64)) > (
                            distance - earlier
                        ) // len(_BANDS)
                    yield order[left[near]], order[right[near]]
                done += MOST_PARTNERS
                is_open = partners_N[order[rows]] < MOST_PARTNERS
                rows, first, count = rows[is_open], first[is_open], count[is_open]


def _finder(
    places: npt.NDArray[np.int64], num_bits: int
) -> Callable[[npt.NDArray[np.int64]], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Return a function that finds numbers in the sorted `places`: the first place of each, and how many there are."""
    if len(places) < 1 << 16:  # the tables would cost more than the search

        def search(wanted: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
            first = np.searchsorted(places, wanted)
            return first, np.searchsorted(places, wanted, side="right") - first

        return search
    sizes = np.bincount(places, minlength=1 << num_bits)
    starts = np.cumsum(sizes) - sizes
    return lambda wanted: (starts[wanted], sizes[wanted])


def _band(bits64: npt.NDArray[np.uint64], shift: int, num_bits: int) -> npt.NDArray[np.int64]:
    return ((bits64 >> np.uint64(shift)) & np.uint64((1 << num_bits) - 1)).astype(np.int64)


def _masks(radius: int, num_bits: int) -> list[int]:
    """Return all numbers with at most `radius` of `num_bits` bits set, those with the fewest first."""
    return [sum(1 << bit for bit in bits) for n in range(radius + 1) for bits in combinations(range(num_bits), n)]


def _chunks(count: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Return row numbers in runs of about `_CHUNK` candidates each."""
    run = np.cumsum(count) // _CHUNK
    return np.split(np.arange(len(count)), np.flatnonzero(np.diff(run)) + 1)


def _popcount(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Source: Warren, Hacker's Delight, section 5-1."""
    values = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    values = (values & np.uint64(0x3333333333333333)) + ((values >> np.uint64(2)) & np.uint64(0x3333333333333333))
    values = (values + (values >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((values * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)


def _first(chains: npt.NDArray[np.int64], images: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the first image of the chain of each image."""
    first = chains[images]
    while (chains[first] != first).any():
        first = chains[first]
    chains[images] = first
    return first


def join_groups(chains_N: npt.NDArray[np.int64], groups_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return chains that also join all images of a group: int64 [N], as `Near.chains_N`.

    Args:
        groups_N: a number for each image, the same for all images of a group.
    """
    chains = chains_N.copy()
    _, first, group = np.unique(groups_N, return_index=True, return_inverse=True)
    _join(chains, first[group], np.arange(len(chains)))
    return _first(chains, np.arange(len(chains)))


def _join(chains: npt.NDArray[np.int64], left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> None:
    """Join the chains of each pair, in place."""
    while len(left):
        one, other = _first(chains, left), _first(chains, right)
        apart = one != other
        left, right, one, other = left[apart], right[apart], one[apart], other[apart]
        np.minimum.at(chains, np.maximum(one, other), np.minimum(one, other))


def _nearest(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the first `MOST_LISTED` rows in their order."""
    return rows[np.lexsort(rows.T[::-1])[:MOST_LISTED]]


def _signs(waves: npt.NDArray[np.float64]) -> bytes:
    """Return a bit for each wave: above the median of all waves except the mean brightness, which has no shape."""
    flat = waves.ravel()
    median = np.sort(flat[1:])[len(flat) // 2 - 1]
    return np.packbits(flat > median).tobytes()
