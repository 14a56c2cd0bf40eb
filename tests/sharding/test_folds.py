"""Folds and splits by groups: the greedy rule of scikit-learn's StratifiedGroupKFold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_build import read_samples
from test_groups import splits_of_groups, write_sites

from wasteddp.data.dataset import choose_fold, num_folds
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.errors import SettingsError, ShardError, SourceError
from wasteddp.sharding import groups as module
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.groups import F64, I64


def reference(counts_GK: np.ndarray, num_folds: int) -> list[int]:
    """scikit-learn's StratifiedGroupKFold, without its shuffling: `_iter_test_indices` and `_find_best_fold`."""
    totals = counts_GK.sum(axis=0)
    per_fold = np.zeros((num_folds, counts_GK.shape[1]))
    chosen = [-1] * len(counts_GK)
    for group in np.argsort(-np.std(counts_GK, axis=1), kind="mergesort"):
        best, least, fewest = -1, np.inf, np.inf
        for fold in range(num_folds):
            per_fold[fold] += counts_GK[group]
            deviation = np.mean(np.std(per_fold / totals, axis=0))
            per_fold[fold] -= counts_GK[group]
            samples = per_fold[fold].sum()
            is_equal = np.isclose(deviation, least, rtol=1e-9, atol=0)
            if (samples < fewest) if is_equal else (deviation < least):
                best, least, fewest = fold, deviation, samples
        per_fold[best] += counts_GK[group]
        chosen[group] = best
    return chosen


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 5), st.integers(6, 60))
def test_equal_fractions_give_the_folds_of_scikit_learn(seed: int, num: int, num_classes: int, num_groups: int) -> None:
    random = np.random.default_rng(seed)
    counts = random.integers(0, 9, (num_groups, num_classes))
    counts[random.random(num_groups) < 0.4] = 0
    counts[counts.sum(axis=1) == 0, 0] = 1  # groups of one image
    counts[0] = 1  # each class occurs
    expected = reference(counts, num)
    if set(expected) == set(range(num)):
        assert module.divide_groups(counts, [1 / num] * num) == expected


def test_scikit_learn_itself_chooses_the_same_folds() -> None:
    """At each of its steps. Between folds that are equally good, it decides by rounding."""
    model_selection = pytest.importorskip("sklearn.model_selection")
    equal = []

    class Compared(model_selection.StratifiedGroupKFold):  # type: ignore[misc, name-defined]
        def _find_best_fold(self, y_counts_per_fold: F64, y_cnt: I64, group_y_counts: F64) -> int:
            theirs = super()._find_best_fold(y_counts_per_fold, y_cnt, group_y_counts)
            costs = module._unevenness(y_counts_per_fold, group_y_counts, np.full((5, 1), 0.2), y_cnt).tolist()
            ours = module._least(costs, y_counts_per_fold.sum(axis=1).tolist())
            assert costs[theirs] == pytest.approx(costs[ours], rel=1e-5)
            equal.append(ours == theirs)
            return int(theirs)

    for seed in range(20):
        random = np.random.default_rng(seed)
        groups = random.integers(0, 30, 400)
        labels = (random.integers(0, 4, 400) + groups) % 4
        list(Compared(5).split(labels, labels, groups))
    assert np.mean(equal) > 0.95


def test_fractions_are_met_for_each_class() -> None:
    random = np.random.default_rng(0)
    counts = random.multinomial(20, (0.6, 0.3, 0.1), size=200)
    found = np.array(module.divide_groups(counts, (0.7, 0.15, 0.15)))
    for part, fraction in enumerate((0.7, 0.15, 0.15)):
        assert np.abs(counts[found == part].sum(axis=0) / counts.sum(axis=0) - fraction).max() < 0.02


def test_each_part_has_a_group_and_given_ones_stay() -> None:
    assert sorted(module.divide_groups(np.full((3, 2), 5), (0.7, 0.15, 0.15))) == [0, 1, 2]
    assert module.divide_groups(np.array([[9, 9], [1, 1]]), (0.5, 0.5), fixed={0: 1})[0] == 1
    assert module.divide_groups(np.array([[9, 9], [1, 1]]), (0.5, 0.5), fixed={0: 1, 1: 1}) == [1, 1]


def test_the_order_of_equal_groups_follows_the_seed(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images", num_sites=9)
    found = [
        splits_of_groups(
            make_shards(
                Job(images, tmp_path / str(seed), Options(group_level=1, split_seed=seed), class_folders="inner"),
                workers=1,
            )
        )
        for seed in (0, 1)
    ]
    assert found[0] != found[1]


FOLDS = Options(shard_mb=0.02, group_level=1, folds=3)


def test_folds_hold_each_image_once_and_no_group_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_sites(tmp_path / "images", num_sites=14)
    manifest = make_shards(Job(images, tmp_path / "set", FOLDS, class_folders="inner"), workers=2)
    assert list(manifest.splits) == ["fold-0", "fold-1", "fold-2", "test"]
    assert num_folds(manifest) == 3
    assert all(len(splits) == 1 for splits in splits_of_groups(manifest).values())
    assert {split.samples_per_class for name, split in manifest.splits.items() if name != "test"} == {(20, 20)}
    assert manifest.splits["test"].samples_per_class == (10, 10)
    everything = [str(s["source"]) for split in manifest.splits for s in read_samples(manifest.folder, split)]
    assert len(set(everything)) == len(everything) == 140


def test_a_fold_is_train_and_val_of_the_same_shards(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images", num_sites=14)
    manifest = make_shards(Job(images, tmp_path / "set", FOLDS, class_folders="inner"), workers=2)
    sources = {split: {s["source"] for s in read_samples(manifest.folder, split)} for split in manifest.splits}
    for fold in range(3):
        chosen = choose_fold(manifest, fold)
        assert list(chosen.splits) == ["train", "val", "test"]
        assert chosen.sha256 == manifest.sha256
        for split, expected in (
            ("val", sources[f"fold-{fold}"]),
            ("train", set().union(*(sources[f"fold-{n}"] for n in range(3) if n != fold))),
        ):
            reader = SplitReader(chosen, split)
            assert {reader.source(n) for n in range(reader.num_samples)} == expected
            assert np.bincount(reader.labels).tolist() == list(chosen.splits[split].samples_per_class)
            reader.close()


def test_a_fold_that_is_not_there_is_refused(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images")
    with_folds = make_shards(Job(images, tmp_path / "1", FOLDS, class_folders="inner"), workers=1)
    without = make_shards(Job(images, tmp_path / "2", Options(), class_folders="inner"), workers=1)
    with pytest.raises(SettingsError, match=r"data\.fold is 3, and .* has the folds 0 to 2"):
        choose_fold(with_folds, 3)
    with pytest.raises(SettingsError, match="has no folds"):
        choose_fold(without, 0)
    assert choose_fold(without, -1) is without
    with pytest.raises(ShardError, match=r"set data\.fold to the fold to validate on"):
        with_folds.split("train")


def test_single_images_are_divided_by_class(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images", num_sites=1, each=20)
    options = Options(folds=4, fractions=(1, 0, 0))
    manifest = make_shards(Job(images / "site1", tmp_path / "set", options), workers=1)
    assert {split.samples_per_class for split in manifest.splits.values()} == {(5, 5)}
    assert list(manifest.splits) == ["fold-0", "fold-1", "fold-2", "fold-3"]


def test_near_duplicates_are_in_one_fold(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images", num_sites=1, each=20) / "site1"
    for number in range(6):
        (images / "glass" / f"near{number}.jpg").write_bytes(
            (images / "glass" / "0.jpg").read_bytes() + bytes(number + 1)
        )
    manifest = make_shards(Job(images, tmp_path / "set", Options(folds=4, fractions=(1, 0, 0))), workers=1)
    found = {split for split in manifest.splits for s in read_samples(manifest.folder, split)
             if "near" in str(s["source"])}  # fmt: skip
    assert len(found) == 1


def test_images_that_are_split_become_folds_and_the_test_split_stays(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        write_sites(tmp_path / "images" / split, num_sites=1, each=count)
        (tmp_path / "images" / split / "site1").rename(tmp_path / "images" / f"{split}2")
        (tmp_path / "images" / split).rmdir()
        (tmp_path / "images" / f"{split}2").rename(tmp_path / "images" / split)
    for file in sorted((tmp_path / "images").rglob("*.jpg")):
        file.write_bytes(file.read_bytes() + file.parent.parent.name.encode())
    manifest = make_shards(
        Job(tmp_path / "images", tmp_path / "set", Options(folds=3, group_near_duplicates=False)), workers=1
    )
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {
        "fold-0": 6, "fold-1": 6, "fold-2": 6, "test": 4,
    }  # fmt: skip
    tests = {str(s["source"]).split("/")[0] for s in read_samples(manifest.folder, "test")}
    assert tests == {"test"}


def test_too_many_folds_are_refused(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images", num_sites=4)
    options = Options(folds=5, group_level=1, fractions=(1, 0, 0))
    with pytest.raises(SourceError, match=r"--folds 5 of 40 images in 4 group.*: fold-4 would have none"):
        make_shards(Job(images, tmp_path / "set", options, class_folders="inner"), workers=1)
    with pytest.raises(SourceError, match="--folds is 1"):
        Options(folds=1).check()


def test_a_set_of_folds_is_extended_by_its_folds(tmp_path: Path) -> None:
    images = write_sites(tmp_path / "images", num_sites=14)
    old = make_shards(Job(images, tmp_path / "old", FOLDS, class_folders="inner"), workers=1)
    write_sites(tmp_path / "more", num_sites=20)
    for site in range(15, 21):
        (tmp_path / "more" / f"site{site}").rename(images / f"site{site}")
    new = make_shards(Job(images, tmp_path / "new", Options(), class_folders="inner", extends=old), workers=1)
    before, after = splits_of_groups(old), splits_of_groups(new)
    assert {group: after[group] for group in before} == before
    assert sum(split.num_samples for split in Manifest.load(new.folder).splits.values()) == 200
