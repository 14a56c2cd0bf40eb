"""The loader: the plan's samples, the same pixels for any number of workers, and how damage is handled."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from wasteddp.data.augmentation.augment import Augment
from wasteddp.data.batch import Batch
from wasteddp.data.loader import Loader, evaluation_loader, evaluation_steps, training_loader, training_steps
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.errors import DamagedSampleError
from wasteddp.order.plan import PADDING, EvaluationPlan, TrainPlan


def loader_of(reader: SplitReader, workers: int = 2, prefetch: int = 2) -> Loader:
    return training_loader(
        reader,
        seed=0,
        image_size_px=24,
        crop_scale=(0.3, 1.0),
        crop_ratio=(0.75, 1.33),
        workers=workers,
        prefetch=prefetch,
        pin_memory=False,
    )


def run(shards: Path, first: int = 0, last: int = 6, *, rank: int = 0, world_size: int = 1, **how: int) -> list[Batch]:
    plan = TrainPlan(50, 12, 0, 12)
    with SplitReader(Manifest.load(shards), "train") as reader, loader_of(reader, **how) as loader:
        return list(loader.batches(training_steps(plan, first, last, rank=rank, world_size=world_size)))


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (5, 4)])
def test_pixels_do_not_depend_on_workers_or_prefetch(small_shards: Path, workers: int, prefetch: int) -> None:
    for one, other in zip(run(small_shards), run(small_shards, workers=workers, prefetch=prefetch), strict=True):
        assert np.array_equal(one.samples, other.samples)
        assert torch.equal(one.images_BCHW, other.images_BCHW)
        assert torch.equal(one.labels_B, other.labels_B)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_what_one_rank_sees(small_shards: Path, world_size: int) -> None:
    parts = [run(small_shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, whole in enumerate(run(small_shards)):
        assert torch.equal(torch.cat([part[step].images_BCHW for part in parts]), whole.images_BCHW)


def test_starting_in_the_middle_gives_what_an_uninterrupted_run_gives(small_shards: Path) -> None:
    whole = run(small_shards)
    for first in range(1, 6):
        for resumed, uninterrupted in zip(run(small_shards, first), whole[first:], strict=True):
            assert (resumed.epoch, resumed.step_in_epoch) == (uninterrupted.epoch, uninterrupted.step_in_epoch)
            assert torch.equal(resumed.images_BCHW, uninterrupted.images_BCHW)


def test_a_sample_is_cropped_differently_in_another_epoch(small_shards: Path) -> None:
    first, *_, second = run(small_shards, 0, 8)
    assert (first.epoch, second.epoch) == (0, 1)
    both = set(first.samples.tolist()) & set(second.samples.tolist())
    assert both, "the test needs a sample that is in both batches"
    for sample in both:
        a, b = (batch.images_BCHW[batch.samples.tolist().index(sample)] for batch in (first, second))
        assert not torch.equal(a, b)


def test_labels_are_those_of_the_index(small_shards: Path) -> None:
    with SplitReader(Manifest.load(small_shards), "train") as reader:
        labels = reader.labels
    for batch in run(small_shards):
        assert batch.labels_B.tolist() == labels[batch.samples].tolist()


def test_images_are_channels_last_without_a_copy(small_shards: Path) -> None:
    images = run(small_shards, 0, 1)[0].images_BCHW
    assert images.dtype == torch.uint8
    assert images.shape == (12, 3, 24, 24)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_micro_batches_are_the_batch_cut_in_order(small_shards: Path) -> None:
    batch = run(small_shards, 0, 1)[0]
    micros = list(batch.split(4))
    assert [len(micro.samples) for micro in micros] == [4, 4, 4]
    assert torch.equal(torch.cat([micro.images_BCHW for micro in micros]), batch.images_BCHW)


def test_evaluation_pads_the_last_batch(small_shards: Path) -> None:
    plan = EvaluationPlan(13, 8)
    with (
        SplitReader(Manifest.load(small_shards), "val") as reader,
        evaluation_loader(reader, image_size_px=24, resize_px=28, workers=2) as loader,
    ):
        batches = list(loader.batches(evaluation_steps(plan, rank=0, world_size=1)))
    assert [len(batch.samples) for batch in batches] == [8, 8]
    assert (batches[1].samples == PADDING).tolist() == [False] * 5 + [True] * 3
    assert batches[1].images_BCHW[5:].sum() == 0


def test_decoding_threads_have_no_teams_and_the_caller_keeps_its_own(small_shards: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with SplitReader(Manifest.load(small_shards), "train") as reader, loader_of(reader, workers=3) as loader:
            assert torch.get_num_threads() == 2
            assert {loader._pool.submit(torch.get_num_threads).result() for _ in range(20)} == {1}
    finally:
        torch.set_num_threads(threads)


def _damage(shards: Path, sample: int) -> None:
    manifest = Manifest.load(shards)
    for split in ("train", "val"):
        with SplitReader(manifest, split) as reader:
            offset = int(reader._index[sample]["offset"])
        with (shards / manifest.split(split).shards[0].tar).open("r+b") as file:
            file.seek(offset)
            file.write(b"\0" * 64)


def test_a_damaged_training_sample_is_replaced_by_the_next_and_reported(small_shards: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    _damage(shards, 3)
    damage = [item for batch in run(shards, 0, 4) for item in batch.damage]
    assert [(item.sample, item.replaced_by) for item in damage] == [(3, 4)]
    assert "train-000000.tar, sample 3" in damage[0].where
    again = [item for batch in run(shards, 0, 4, workers=1) for item in batch.damage]
    assert again == damage


def test_a_damaged_evaluation_sample_ends_the_evaluation(small_shards: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    _damage(shards, 3)
    with (
        SplitReader(Manifest.load(shards), "val") as reader,
        evaluation_loader(reader, image_size_px=24, resize_px=28, workers=2) as loader,
        pytest.raises(
            DamagedSampleError,
            match=r"val-000000.tar, sample 3 .* cannot be used(.|\n)*would not cover the whole split",
        ),
    ):
        list(loader.batches(evaluation_steps(EvaluationPlan(13, 8), rank=0, world_size=1)))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_the_network_sees_of_a_sample_is_the_same_bit_for_bit_on_every_rank_and_worker(
    small_shards: Path, world_size: int, workers: int
) -> None:
    augment = Augment(
        0, horizontal_flip=0.5, vertical_flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, erase=0.5
    )

    def seen(**how: int) -> dict[tuple[int, int], bytes]:
        """Return {(epoch, sample): pixels after augmentation} for three steps around the end of an epoch."""
        return {
            (batch.epoch, int(sample)): pixels.numpy().tobytes()
            for batch in run(small_shards, 2, 6, **how)
            for sample, pixels in zip(
                batch.samples, augment(batch.images_BCHW, batch.samples, batch.epoch), strict=True
            )
        }

    together: dict[tuple[int, int], bytes] = {}
    for rank in range(world_size):
        together |= seen(rank=rank, world_size=world_size, workers=workers)
    alone = seen(workers=1)
    assert len(alone) == 4 * 12
    assert {epoch for epoch, _ in alone} == {0, 1}
    assert together == alone
