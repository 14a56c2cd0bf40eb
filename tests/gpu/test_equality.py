"""A GPU gives the results of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_augment
import test_randaugment
import torch
from gpu_waits import ON_A_GPU
from test_batch import batches
from test_ema import DECAY, move, network
from test_gpu_decoding import LEFT, VIEW, run
from test_operations import every_operation, pictures

from wasteddp.data.augmentation.augment import Augment
from wasteddp.data.augmentation.operations import apply
from wasteddp.data.batch import copied_ahead
from wasteddp.model.ema import Ema

pytestmark = ON_A_GPU


@pytest.mark.parametrize("policy", ["trivialaugment", "randaugment"])
def test_a_policy_gives_the_same_bits(policy: str) -> None:
    augment, images = Augment(0, horizontal_flip=0.5, policy=policy), test_randaugment.images(64)
    assert torch.equal(augment(images.cuda(), np.arange(64), 0).cpu(), augment(images, np.arange(64), 0))


def test_each_operation_gives_the_same_bits() -> None:
    images, (operations, magnitudes) = pictures(65, 64).repeat(12, 1, 1, 1), every_operation(60)
    assert torch.equal(apply(images.cuda(), operations, magnitudes).cpu(), apply(images, operations, magnitudes))


@pytest.mark.parametrize("policy", ["none", "randaugment"])
def test_the_augmentation_gives_the_same_bits_by_one_kernel_and_by_many(policy: str) -> None:
    images, augment = test_augment.images(16), replace(test_augment.ALL, policy=policy)
    expected, said = augment(images, np.arange(16), 0), []
    kernel = augment.on(torch.device("cuda"), said.append)
    assert kernel.kernel is not None, said
    for way in (augment, kernel):
        assert torch.equal(way(images.cuda(), np.arange(16), 0).cpu().view(torch.int32), expected.view(torch.int32))


def test_what_the_augmentation_takes(measured: Callable[[str], None]) -> None:
    pixels = torch.randint(0, 256, (256, 224, 224, 3), dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
    augment = Augment(0, horizontal_flip=0.5, vertical_flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2)
    for name, way in (("many kernels", augment), ("one kernel", augment.on(pixels.device, print))):
        milliseconds = []
        for epoch in range(20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            way(pixels, np.arange(256), epoch)
            end.record()
            end.synchronize()
            milliseconds.append(begin.elapsed_time(end))
        measured(f"augmentation of 256 images of 224 px by {name}: {np.median(milliseconds):.2f} ms")


def test_the_average_of_the_weights_is_nearly_the_same() -> None:
    models = network(), network().cuda()
    models[1].load_state_dict(models[0].state_dict())
    averages = [Ema(model, DECAY) for model in models]
    for step in range(3):
        move(models[0], step)
        models[1].load_state_dict(models[0].state_dict())
        for average in averages:
            average.update(step, None)
    on_cpu, on_gpu = (average.network.state_dict() for average in averages)
    for name, tensor in on_cpu.items():
        assert torch.allclose(tensor, on_gpu[name].cpu(), rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("count", [0, 1, 5])
def test_batches_are_copied_in_order(count: int) -> None:
    passed = list(copied_ahead(iter(batches(count)), torch.device("cuda")))
    assert [int(batch.images_BCHW[0, 0, 0, 0]) for batch in passed] == list(range(count))
    assert all(batch.images_BCHW.is_cuda and batch.labels_B.is_cuda for batch in passed)


def test_nvjpeg_decodes_whole_batches(small_shards: Path) -> None:
    left = copied_ahead(iter(run(small_shards, LEFT)), torch.device("cuda"))
    for ours, decoded in zip(run(small_shards, VIEW), left, strict=True):
        assert not decoded.encoded_B
        assert (ours.images_BCHW.int() - decoded.images_BCHW.cpu().int()).abs().float().mean() < 4
