"""Images are assigned to splits by fractions or by list files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wasteddp.errors import SourceError
from wasteddp.sharding import splits
from wasteddp.sharding.sources.archives import File
from wasteddp.sharding.sources.layout import Layout, SourceImage

hashes = st.lists(st.binary(min_size=32, max_size=32), max_size=50, unique=True)


@given(hashes, hashes, st.integers(0, 2**40))
def test_adding_images_never_moves_old_ones(old: list[bytes], new: list[bytes], seed: int) -> None:
    before = dict(zip(old, splits.by_fractions(old, (0.5, 0.3, 0.2), seed=seed), strict=True))
    everything = new + old
    after = dict(zip(everything, splits.by_fractions(everything, (0.5, 0.3, 0.2), seed=seed), strict=True))
    assert all(after[image] == split for image, split in before.items())


def test_the_fractions_are_met_and_another_seed_gives_another_split() -> None:
    images = [hashlib.sha256(b"%d" % n).digest() for n in range(5000)]
    first, second = (splits.by_fractions(images, (0.7, 0.15, 0.15), seed=seed) for seed in (0, 1))
    # standard deviation of the train share: sqrt(0.7 * 0.3 / 5000) = 0.65 %
    assert abs(first.count("train") / 5000 - 0.7) < 0.02
    assert abs(first.count("test") / 5000 - 0.15) < 0.02
    assert first != second


@given(hashes)
def test_nothing_falls_into_a_split_of_fraction_zero(images: list[bytes]) -> None:
    assert "test" not in splits.by_fractions(images, (0.7, 0.3, 0.0), seed=0)
    assert "val" not in splits.by_fractions(images, (0.7, 0.0, 0.3), seed=0)


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (0.5, 0.2, 0.2), (1.2, -0.1, -0.1), (0, 0.5, 0.5)])
def test_fractions_that_say_nothing_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(SourceError, match="add up to"):
        splits.check_fractions(fractions)


def test_two_fractions_are_refused_with_the_two_ways_to_write_them() -> None:
    with pytest.raises(SourceError, match=r"0\.8,0\.2,0 without a test split, or 0\.8,0,0\.2 without a val split"):
        splits.check_fractions((0.8, 0.2))


@given(st.data())
def test_a_chain_of_near_duplicates_goes_where_its_smallest_hash_goes(data: st.DataObject) -> None:
    images = data.draw(st.lists(st.binary(min_size=2, max_size=2), min_size=2, max_size=20, unique=True))
    chains = [data.draw(st.integers(0, len(images) - 1)) for _ in images]
    chosen = [data.draw(st.sampled_from(("train", "val", "test"))) for _ in images]
    grouped = splits.group_splits(chosen, images, np.array(chains, np.int64))
    for chain in chains:
        group = [i for i, other in enumerate(chains) if other == chain]
        smallest = min(group, key=lambda i: images[i])
        assert {grouped[i] for i in group} == {chosen[smallest]}


def digests(count: int, first: int = 0) -> list[bytes]:
    return [hashlib.sha256(b"%d" % n).digest() for n in range(first, first + count)]


def stratify(
    classes: list[str],
    images: list[bytes],
    chains: list[int] | None = None,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    **kept: dict[int, str],
) -> list[str]:
    groups = np.array(list(range(len(images))) if chains is None else chains)
    return splits.stratified(classes, images, groups, fractions, seed=0, **{"kept": {}, **kept})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("count", "fractions", "sizes"),
    [
        (40, (0.7, 0.15, 0.15), (28, 6, 6)),
        (1000, (0.8, 0.1, 0.1), (800, 100, 100)),
        (40, (0.7, 0.3, 0.0), (28, 12, 0)),
        (3, (0.7, 0.15, 0.15), (1, 1, 1)),
        (2, (0.7, 0.15, 0.15), (1, 1, 0)),
        (1, (0.1, 0.8, 0.1), (1, 0, 0)),
    ],
)
def test_each_class_has_its_fractions_and_a_rare_class_is_in_train_first(
    seed: int, count: int, fractions: tuple[float, float, float], sizes: tuple[int, int, int]
) -> None:
    images = digests(count + 10, first=1000 * seed)
    found = stratify(["rare"] * count + ["other"] * 10, images, fractions=fractions)[:count]
    assert tuple(found.count(split) for split in ("train", "val", "test")) == sizes


def test_added_images_move_few_stratified_images_and_none_whose_split_is_kept() -> None:
    images = digests(1100)
    before = stratify(["a"] * 1000, images[:1000])
    after = stratify(["a"] * 1100, images)
    assert sum(old != new for old, new in zip(before, after, strict=False)) < 40
    kept = stratify(["a"] * 1100, images, kept=dict(enumerate(before)))
    assert kept[:1000] == before
    assert kept.count("train") == 770


@given(st.data())
def test_a_chain_is_in_one_split_and_a_large_one_in_train(data: st.DataObject) -> None:
    images = digests(40)
    chains = [data.draw(st.integers(0, 30)) for _ in images]
    classes = ["ab"[chain % 2] for chain in chains]
    found = stratify(classes, images, chains)
    for chain in set(chains):
        assert len({found[i] for i, other in enumerate(chains) if other == chain}) == 1
    assert set(stratify(["a"] * 40, images, [0] * 20 + list(range(20, 40)))[:20]) == {"train"}


def test_an_empty_split_and_too_few_images_of_a_class_are_refused() -> None:
    with pytest.raises(SourceError, match=r"val and test would have none .*5 of them are near-duplicates"):
        splits.check_sizes(["train"] * 5, ["a"] * 5, (0.7, 0.15, 0.15), largest_chain=5, least=0)
    splits.check_sizes(["train"] * 5, ["a"] * 5, (1, 0, 0), largest_chain=5, least=0)
    with pytest.raises(SourceError, match="fewer than 2 images of a class in a split: b in val: 1"):
        splits.check_sizes(
            ["train", "train", "val", "val"] * 2 + ["train"],
            [*"abaa", *"abab", "b"],
            (0.7, 0.3, 0),
            largest_chain=1,
            least=2,
        )


def layout(*paths: str) -> Layout:
    images = tuple(SourceImage(File(path, 1, ""), path.split("/")[-2]) for path in paths)
    return Layout(images, tuple(sorted({p.class_name for p in images})))


def lists(folder: Path, **texts: str) -> list[splits.ListedImage]:
    for split, text in texts.items():
        (folder / f"one-indexed-{split}.txt").write_text(text)
    return splits.read_list_files(splits.find_list_files(folder))


def test_trashnets_lists_give_splits_whatever_the_order_of_their_numbers(tmp_path: Path) -> None:
    listed = lists(tmp_path, train="glass1.jpg 2\nmetal1.jpg 1\n", test="glass2.jpg 2\ngone.jpg 1\n")
    result, not_listed, missing = splits.apply_lists(
        layout("glass/glass1.jpg", "glass/glass2.jpg", "metal/metal1.jpg", "metal/metal2.jpg"), listed
    )
    assert [(p.file.path, p.split) for p in result.images] == [
        ("glass/glass1.jpg", "train"),
        ("glass/glass2.jpg", "test"),
        ("metal/metal1.jpg", "train"),
    ]
    assert not_listed == ["metal/metal2.jpg"]
    assert [line.name for line in missing] == ["gone.jpg"]


def test_list_files_are_found_by_words_of_their_names(tmp_path: Path) -> None:
    for name in ("latest", "interval", "trainlist01", "Validation-set", "test_images"):
        (tmp_path / f"{name}.txt").touch()
    found = {split: file.stem for split, file in splits.find_list_files(tmp_path).items()}
    assert found == {"train": "trainlist01", "val": "Validation-set", "test": "test_images"}


def test_lists_without_numbers_and_names_with_spaces_are_read(tmp_path: Path) -> None:
    listed = lists(tmp_path, train="a/my 1.jpg\nb/my 1.jpg 7\n")
    result, _, _ = splits.apply_lists(layout("x/a/my 1.jpg", "x/b/my 1.jpg"), listed)
    assert len(result.images) == 2
    assert [line.label_number for line in listed] == [None, 7]


def test_a_number_of_5000_digits_is_part_of_a_name(tmp_path: Path) -> None:
    assert [line.label_number for line in lists(tmp_path, train="a/1.jpg " + "7" * 5000)] == [None]


def test_lists_of_other_programs_are_read(tmp_path: Path) -> None:
    listed = lists(tmp_path, train="a\\1.jpg\t1\nb/1.jpg,2\n./b/2.jpg; 2\nc d,e.jpg\n")
    result, not_listed, missing = splits.apply_lists(layout("a/1.jpg", "b/1.jpg", "b/2.jpg", "b/c d,e.jpg"), listed)
    assert (len(result.images), not_listed, missing) == (4, [], [])
    assert [line.label_number for line in listed] == [1, 2, 2, None]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("a1.jpg 1\na2.jpg 2\n", "", r"train.txt:2: a2.jpg is in the folder a and has the label number 2"),
        ("a1.jpg 1\nb1.jpg 1\n", "", r"b1.jpg is in the folder b .* a1.jpg is 1, which is in the folder a"),
        ("a1.jpg 1\n", "a1.jpg 1\n", r"a1.jpg is listed twice: .*train.txt:1 \(train\) and .*test.txt:1 \(test\)"),
        ("same.jpg\n", "", r"same.jpg may be a/same.jpg or b/same.jpg"),
    ],
)
def test_lists_that_contradict_are_refused(tmp_path: Path, train: str, test: str, message: str) -> None:
    images = layout("a/a1.jpg", "a/a2.jpg", "a/same.jpg", "b/b1.jpg", "b/same.jpg")
    with pytest.raises(SourceError, match=message):
        splits.apply_lists(images, lists(tmp_path, train=train, test=test))


def test_split_files_are_a_folder_or_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no \.txt file with the word train in its name"):
        splits.parse_split_files([str(tmp_path)])
    assert splits.parse_split_files(["train=a.txt", "valid=b.txt"]) == {"train": Path("a.txt"), "val": Path("b.txt")}
    for wrong in (["train=a", "holdout=b"], ["val=a"], ["train=a", "train=b"], ["nowhere"]):
        with pytest.raises(SourceError, match="is neither a folder nor train=FILE"):
            splits.parse_split_files(wrong)
    for name in ("train1.txt", "train2.txt"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match=r"holds 2 lists for train: train1.txt, train2.txt"):
        splits.parse_split_files([str(tmp_path)])
