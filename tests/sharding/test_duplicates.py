"""Copies are found by their bytes, near-duplicates by their perceptual hashes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from wasteddp.data.decoding.decode import check_image
from wasteddp.sharding.duplicates import (
    CONFIRMED_DISTANCE,
    MOST_PARTNERS,
    Near,
    candidates,
    find_near,
    leave_out_copies,
    perceptual_hash,
)
from wasteddp.sharding.sources.archives import File
from wasteddp.sharding.sources.layout import SourceImage
from wasteddp.sharding.sources.synthetic import draw_image


def search(bits64: list[int], bits256: np.ndarray, kinds: list[int] | None = None) -> Near:
    kinds = kinds or list(range(len(bits64)))
    apart = ~np.eye(max(kinds, default=0) + 1, dtype=bool)
    return find_near(np.array(bits64, np.uint64), bits256, np.array(kinds, np.int64), apart)


def image(path: str, class_name: str, split: str = "") -> SourceImage:
    return SourceImage(File(path, 1, ""), class_name, split)


def test_of_equal_images_of_one_class_the_first_is_kept() -> None:
    images = [image("a/1", "a"), image("a/2", "a"), image("a/3", "a")]
    kept, left_out = leave_out_copies(images, [b"x", b"y", b"x"], keep_conflicts=False)
    assert kept == [0, 1]
    assert [(left.source, left.reason) for left in left_out] == [("a/3", "duplicate")]


def test_of_equal_images_in_several_splits_the_one_in_test_is_kept() -> None:
    images = [image("train/a/1", "a", "train"), image("val/a/1", "a", "val"), image("test/a/1", "a", "test")]
    assert leave_out_copies(images, [b"x"] * 3, keep_conflicts=False)[0] == [2]
    assert leave_out_copies(images[:2], [b"x"] * 2, keep_conflicts=False)[0] == [1]


def test_equal_images_of_two_classes_are_all_left_out_by_default() -> None:
    images = [image("a/1", "a"), image("a/2", "a"), image("b/1", "b")]
    kept, left_out = leave_out_copies(images, [b"x"] * 3, keep_conflicts=False)
    assert kept == []
    assert {left.reason for left in left_out} == {"conflicting_label"}
    assert left_out[0].detail == "same bytes as a/2 (a), b/1 (b)"
    kept, left_out = leave_out_copies(images, [b"x"] * 3, keep_conflicts=True)
    assert kept == [0]
    assert [left.source for left in left_out] == ["a/2", "b/1"]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=12),
    st.lists(st.tuples(st.integers(0, 11), st.sets(st.integers(0, 63), max_size=12)), max_size=20),
    st.integers(0, 11),
)
def test_the_search_finds_exactly_the_pairs_that_comparing_all_with_all_finds(
    seeds: list[int], variants: list[tuple[int, set[int]]], distance: int
) -> None:
    values = list(seeds)
    for index, bits in variants:  # values near the others, so that there are pairs to find
        if seeds:
            values.append(seeds[index % len(seeds)] ^ sum(1 << bit for bit in bits))
    parts = candidates(np.array(values, dtype=np.uint64), distance, np.zeros(len(values), np.int64))
    found = sorted([i, j] for left, right in parts for i, j in zip(left.tolist(), right.tolist(), strict=True))
    everything = [[i, j] for i in range(len(values)) for j in range(len(values)) if i != j]
    assert found == [[i, j] for i, j in everything if (values[i] ^ values[j]).bit_count() <= distance]


def test_a_pair_is_confirmed_by_the_finer_hash() -> None:
    bits64 = np.zeros(3, np.uint64)
    bits256 = np.zeros((3, 32), np.uint8)
    bits256[1, : CONFIRMED_DISTANCE // 8] = 255  # just near enough to image 0; image 2 is too far from both
    bits256[2, 10:] = 255
    near = search(bits64.tolist(), bits256)
    assert near.pairs.tolist() == [[0, 1]]
    assert near.distances.tolist() == [CONFIRMED_DISTANCE]


def test_a_rescaled_recompressed_brightened_copy_is_near_and_another_image_is_not() -> None:
    original = draw_image("can", 1, size_px=256, seed=0)
    copy = ImageEnhance.Brightness(Image.open(io.BytesIO(original)).resize((200, 200))).enhance(0.9)
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=60)
    images = [original, buffer.getvalue(), draw_image("can", 2, size_px=256, seed=0)]
    hashes = [perceptual_hash(check_image(data).grey) for data in images]
    bits256 = np.stack([np.frombuffer(h.bits256, np.uint8) for h in hashes])
    near = search([h.bits64 for h in hashes], bits256)
    assert near.pairs.tolist() == [[0, 1]]


@pytest.mark.parametrize("count", [0, 1])
def test_few_images_have_no_pairs(count: int) -> None:
    near = search([0] * count, np.zeros((count, 32), np.uint8))
    assert near.pairs.shape == (0, 2)
    assert near.distances.shape == (0,)


def test_pairs_are_counted_and_listed_between_kinds_and_chains_join_them_all() -> None:
    values = [0, 1, 3, 2**40 - 1, 2**40 - 2, 0xFFFF << 44]
    near = search(values, np.zeros((6, 32), np.uint8), kinds=[1, 0, 0, 0, 0, 1])
    assert near.chains_N.tolist() == [0, 0, 0, 3, 3, 5]
    assert (near.num_pairs, near.is_complete) == (4, True)
    assert near.pairs.tolist() == [[1, 0], [2, 0]]
    assert near.pairs_KK.tolist() == [[0, 2], [0, 0]]
    assert near.images_KK[0, 1] == 1  # one image of kind 1, image 0, also shows in kind 0


@pytest.mark.parametrize("flipping", [0, 8, 16, 24])
def test_of_frames_of_a_standing_camera_few_pairs_are_compared_and_all_frames_are_one_chain(flipping: int) -> None:
    count = 4000
    random = np.random.default_rng(flipping)
    places = random.permutation(64)[:flipping]
    bits = np.zeros((count, 64), np.uint8)
    bits[:, places] = random.integers(0, 2, (count, flipping))
    near = search(np.packbits(bits, axis=1).view(np.uint64)[:, 0].tolist(), np.zeros((count, 32), np.uint8))
    assert not near.chains_N.any()
    assert not near.is_complete
    assert count * MOST_PARTNERS / 2 <= near.num_pairs < count * 8 * MOST_PARTNERS
