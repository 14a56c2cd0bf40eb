"""Balanced draws: exact quotas, no image preferred within its class, for any number of ranks and any first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainings import config_of, final_weights, rows

from wasteddp import cli, train
from wasteddp import settings as settings_file
from wasteddp.data.loader import training_loader, training_steps
from wasteddp.data.manifest import Manifest, Split
from wasteddp.data.reader import SplitReader
from wasteddp.errors import SettingsError
from wasteddp.order import balance as balancing
from wasteddp.order import plan as plans
from wasteddp.order.balance import Balance, quotas
from wasteddp.order.coverage import digest, digest_of_epoch, to_signed
from wasteddp.order.keyed_random import BALANCE, permute
from wasteddp.order.plan import TrainPlan
from wasteddp.order.plan_quality import measure_shuffle
from wasteddp.training.dataloaders import Inputs

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)
EVENNESS = st.sampled_from([1e-9, 0.3, 0.5, 1.0])


def labels_of(sizes: list[int], seed: int = 0) -> np.ndarray:
    """Return labels in a shuffled order, as in a split."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def plan_of(sizes: list[int], evenness: float, batch: int, lanes: int = 0, seed: int = 0) -> TrainPlan:
    plan = TrainPlan(sum(sizes), batch, seed, lanes or batch)
    num_draws = plan.steps_per_epoch * batch
    labels = labels_of(sizes, seed)
    return replace(
        plan, balance=Balance.from_labels(labels, evenness, num_classes=len(sizes), num_draws=num_draws, seed=seed)
    )


def epoch_samples(plan: TrainPlan, epoch: int) -> np.ndarray:
    return np.concatenate([plan.step_samples(epoch, step) for step in range(plan.steps_per_epoch)])


def balance_of(plan: TrainPlan) -> Balance:
    assert plan.balance
    return plan.balance


@given(sizes=SIZES, evenness=EVENNESS, num_draws=st.integers(6, 300))
def test_quotas_add_up_to_the_epoch_and_are_within_one_of_their_share(
    sizes: list[int], evenness: float, num_draws: int
) -> None:
    found = quotas(sizes, evenness, num_draws)
    assert found.sum() == num_draws
    assert found.min() >= 1
    weights = [Fraction(size ** (1 - evenness)) for size in sizes]
    shares = [num_draws * weight / sum(weights) for weight in weights]
    if min(shares) >= 1:  # otherwise a class gets one draw instead of none
        assert all(abs(quota - share) < 1 for quota, share in zip(found.tolist(), shares, strict=True))


@given(sizes=SIZES, num_draws=st.integers(6, 300))
def test_the_two_ends_are_all_images_alike_and_all_classes_alike(sizes: list[int], num_draws: int) -> None:
    if sum(sizes) >= len(sizes):
        assert quotas(sizes, 0.0, sum(sizes)).tolist() == sizes
    alike = quotas(sizes, 1.0, num_draws)
    assert alike.max() - alike.min() <= 1


def test_a_class_is_never_left_without_a_draw() -> None:
    assert quotas([1, 1, 1000, 0], 0.0, 100).tolist() == [1, 1, 98, 0]
    with pytest.raises(SettingsError, match=r"an epoch has 3 draws, and 4 classes have samples(.|\n)*never be drawn"):
        quotas([5, 5, 5, 5], 1.0, 3)


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, evenness=EVENNESS, lanes=st.integers(1, 6), per_lane=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_image_of_a_class_is_trained_on_equally_often_to_within_one_after_any_number_of_epochs(
    sizes: list[int], evenness: float, lanes: int, per_lane: int, seed: int
) -> None:
    batch = lanes * per_lane
    if sum(sizes) // batch * batch < len(sizes):
        return
    plan = plan_of(sizes, evenness, batch, lanes, seed)
    labels, wanted = labels_of(sizes, seed), balance_of(plan).quotas
    times = np.zeros(sum(sizes), np.int64)
    for epoch in range(5):
        seen = epoch_samples(plan, epoch)
        assert len(np.unique(seen)) == len(seen) == plan.steps_per_epoch * batch, "each draw has a number of its own"
        stored = seen % plan.num_samples
        assert np.array_equal(np.bincount(labels[stored], minlength=len(sizes)), wanted)
        np.add.at(times, stored, 1)
        for label in range(len(sizes)):
            assert np.ptp(times[labels == label]) <= 1
    assert plan.left_out_per_epoch == len(plan.left_out_samples(3)) == 0


def test_the_draws_are_those_of_a_list_of_passes_that_is_written_out() -> None:
    sizes, seed = [7, 20, 3], 5
    plan = plan_of(sizes, 0.8, 6, seed=seed)
    balance, labels = balance_of(plan), labels_of(sizes, seed)
    walks = []
    for label, size in enumerate(sizes):
        own = np.flatnonzero(labels == label)
        passes = [own[permute(np.arange(size), size, BALANCE, seed, label, number)] for number in range(60)]
        walks.append(np.concatenate(passes).tolist())
    for epoch in range(5):
        wanted = Counter[int]()
        for label, quota in enumerate(balance.quotas.tolist()):
            wanted.update(walks[label][epoch * quota : (epoch + 1) * quota])
        assert Counter((epoch_samples(plan, epoch) % 30).tolist()) == wanted


@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, evenness=EVENNESS, lanes=st.integers(1, 24), step=st.integers(0, 10**5))
def test_ranks_are_parts_of_the_same_batch_for_every_number_that_divides_the_lanes(
    sizes: list[int], evenness: float, lanes: int, step: int
) -> None:
    if sum(sizes) // lanes * lanes < len(sizes):
        return
    plan = plan_of(sizes, evenness, lanes)
    epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
    whole = plan.step_samples(epoch, step_in_epoch)
    for world_size in [d for d in range(1, lanes + 1) if lanes % d == 0]:
        parts = [plan.step_samples(epoch, step_in_epoch, rank=r, world_size=world_size) for r in range(world_size)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_a_run_resumed_at_any_step_with_any_number_of_ranks_continues_as_if_uninterrupted() -> None:
    last = 4 * plan_of([30, 9, 2], 1.0, 12).steps_per_epoch
    whole = list(training_steps(plan_of([30, 9, 2], 1.0, 12), 0, last, rank=0, world_size=1))
    for first in range(last):
        for world_size in (1, 3, 4):
            resumed = plan_of([30, 9, 2], 1.0, 12)  # a resumed run keeps only the settings and the step
            ranks = [training_steps(resumed, first, last, rank=r, world_size=world_size) for r in range(world_size)]
            for uninterrupted, parts in zip(whole[first:], zip(*ranks, strict=True), strict=True):
                assert np.array_equal(np.concatenate([part[2] for part in parts]), uninterrupted[2])


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, evenness=EVENNESS, batch=st.integers(1, 9), epoch=st.integers(0, 9), parts=st.integers(1, 5))
def test_the_hash_of_an_epoch_is_that_of_its_order_in_any_number_of_parts(
    sizes: list[int], evenness: float, batch: int, epoch: int, parts: int
) -> None:
    if sum(sizes) // batch * batch < len(sizes):
        return
    plan = plan_of(sizes, evenness, batch)
    seen = digest(plan.seed, epoch_samples(plan, epoch) % plan.num_samples)
    assert to_signed(sum(digest_of_epoch(plan, epoch, part=part, parts=parts) for part in range(parts))) == seen


@settings(deadline=None, max_examples=30)
@given(num_samples=st.integers(8, 100), batch=st.integers(1, 8), epoch=st.integers(0, 9), parts=st.integers(1, 5))
def test_the_same_holds_for_an_order_without_balance(num_samples: int, batch: int, epoch: int, parts: int) -> None:
    plan = TrainPlan(num_samples, batch, 3, batch)
    seen = digest(plan.seed, epoch_samples(plan, epoch))
    assert to_signed(sum(digest_of_epoch(plan, epoch, part=part, parts=parts) for part in range(parts))) == seen


@pytest.mark.parametrize("module", [plans, balancing], ids=["shuffle", "pass through a class"])
def test_an_order_that_is_not_a_permutation_is_detected(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of([30, 9, 4], 0.7, 7)

    def faulty(position: np.ndarray, size: Any, *key: Any) -> np.ndarray:
        return permute(np.where(position == 2, 1, position), size, *key)  # one position twice, another never

    monkeypatch.setattr(module, "permute", faulty)
    for epoch in range(3):
        seen = epoch_samples(plan, epoch) % plan.num_samples
        assert len(seen) == plan.steps_per_epoch * plan.global_batch, "only the hash differs"
        assert digest_of_epoch(plan, epoch) != digest(plan.seed, seen)


def test_memory_is_eight_bytes_a_sample_and_epochs_and_seeds_differ() -> None:
    plan = plan_of([30, 9, 2], 1.0, 12)
    balance = balance_of(plan)
    assert balance.members.nbytes == 8 * 41
    found = [epoch_samples(plan, epoch).tobytes() for epoch in range(6)]
    assert len({*found, epoch_samples(plan_of([30, 9, 2], 1.0, 12, seed=1), 0).tobytes()}) == 7


def test_a_balanced_order_is_as_well_shuffled_as_a_uniform_one_of_its_draws() -> None:
    plan = plan_of([8000, 1500, 500], 1.0, 50)
    found = measure_shuffle(plan, labels_of([8000, 1500, 500]))
    assert found.batch > 0.85
    assert found.recent > 0.7  # from 64 groups


def test_a_plan_and_draws_that_do_not_fit_are_a_fault_of_the_program() -> None:
    balance = balance_of(plan_of([30, 11], 1.0, 12))
    with pytest.raises(ValueError, match="36 draws, blocks of 4, and 36 samples an epoch"):
        TrainPlan(41, 12, 0, 12, block=4, balance=balance)
    with pytest.raises(ValueError, match="36 draws, blocks of 1, and 40 samples an epoch"):
        TrainPlan(41, 10, 0, 10, balance=balance)


def test_blocks_are_refused_with_the_reason() -> None:
    with pytest.raises(SettingsError, match=r"balance 0.5 needs block 1, and block is 8: .* include their neighbours"):
        settings_file.parse("data: {balance: 0.5, block: 8}")


def test_of_many_classes_the_extremes_are_named() -> None:
    sizes = list(range(1, 41))
    said = balance_of(plan_of(sizes, 1.0, 10)).describe([f"c{size}" for size in sizes])
    assert said.startswith(
        "balance 1: draws in an epoch, of 40 classes the most and the least often drawn: c1 21 of 1 "
    )
    assert said.endswith("c40 20 of 40 images (0.50 times each)")
    assert said.count(" of ") == 12 + 1


def test_the_plan_reports_how_many_draws_each_class_has(small_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--set", "train.batch_size=12", "--set", "data.balance=1"]
    assert cli.main(["plan", str(small_shards), *more, "--nodes", "1,2"]) == 0
    said = capsys.readouterr().out
    assert "4 steps an epoch of 12, 360 in 90 epochs\n" in said
    assert (
        "balance 1: draws in an epoch: glass 16 of 20 images (0.80 times each), metal 16 of 17 images (0.94 times "
        "each), paper 16 of 13 images (1.23 times each)\n"
    ) in said
    assert "judged by its classes, a batch of 12 is worth 1" in said


def test_the_same_image_is_cropped_otherwise_each_time_that_an_epoch_draws_it(small_shards: Path) -> None:
    with SplitReader(Manifest.load(small_shards), "train") as reader:
        balance = Balance.from_labels(reader.labels, 1.0, num_classes=3, num_draws=48, seed=0)
        plan = TrainPlan(50, 48, 0, 48, balance=balance)
        with training_loader(
            reader,
            seed=0,
            image_size_px=24,
            crop_scale=(0.3, 1.0),
            crop_ratio=(0.75, 1.33),
            workers=1,
            prefetch=1,
            pin_memory=False,
        ) as loader:
            batch = next(loader.batches(training_steps(plan, 0, 1, rank=0, world_size=1)))
        assert batch.labels_B.tolist() == reader.labels[batch.read_B].tolist()
    assert np.array_equal(batch.read_B, batch.samples % 50)
    images = dict(zip(batch.samples.tolist(), batch.images_BCHW, strict=True))
    twice = [number for number in images if number + 50 in images]
    assert len(twice) >= 3, "13 images of the rarest class, 16 draws"
    assert not any(torch.equal(images[number], images[number + 50]) for number in twice)


def test_the_shares_are_those_of_what_is_trained_on() -> None:
    nothing = dict.fromkeys(
        ("manifest", "train_loader", "val_loader", "val_reader", "cache_forecast", "val", "train_labels")
    )
    split = Split("train", (), (30, 9, 1))
    data = Inputs(plan=plan_of([30, 9, 1], 1.0, 10), train=split, **cast(Any, nothing))
    assert data.share_of_classes == (14 / 40, 13 / 40, 13 / 40)
    assert replace(data, plan=TrainPlan(40, 10, 0, 10)).share_of_classes == (30 / 40, 9 / 40, 1 / 40)


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    """Return a finished run of two epochs that draws all classes equally often."""
    folder = tmp_path_factory.mktemp("balanced")
    assert train.main([*config_of(folder, small_shards), "--set", "data.balance=1"]) == 0
    return folder / "run"


def test_a_training_proves_its_balanced_epochs_and_names_what_they_are(balanced: Path) -> None:
    proved = [row for row in rows(balanced) if "coverage/ok" in row]
    assert [(row["step"], row["coverage/samples"], row["coverage/ok"]) for row in proved] == [(4, 48, 1), (8, 48, 1)]
    log = (balanced / "log.txt").read_text()
    assert "8 steps, 4 per epoch; " in log, "no draw is left out"
    assert "balance 1: draws in an epoch: glass 16 of 20 images" in log
    assert "epoch checked: 48 images, each trained on as often as planned" in log


def test_stopped_in_the_middle_of_an_epoch_it_ends_with_the_same_weights(
    balanced: Path, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = config_of(tmp_path, small_shards)
    assert train.main([*arguments, "--set", "data.balance=1", "--set", "train.stop_at_step=6"]) == 0
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert "balance was 1.0 and is 0.0" in said
    assert "--accept-changes balance" in said
    assert train.main([*arguments, "--set", "data.balance=1"]) == 0
    assert final_weights(tmp_path / "run") == final_weights(balanced)
    assert [row["coverage/ok"] for row in rows(tmp_path / "run") if "coverage/ok" in row] == [1, 1]


def test_a_draw_lost_or_doubled_stops_the_run(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[..., np.ndarray] = Balance.samples

    def doubled(self: Balance, epoch: int, draw: np.ndarray) -> np.ndarray:
        return real(self, epoch, np.where(draw == 7, 8, draw))

    monkeypatch.setattr(Balance, "samples", doubled)
    assert train.main([*config_of(tmp_path, small_shards), "--set", "data.balance=1"]) == 2
    assert "epoch 0 trained on 48 samples with hash " in capsys.readouterr().err
