"""Copies to the device: the same batches in the same order, one ahead on a GPU and not a copy on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wasteddp.data.loader import Batch
from wasteddp.training.copying import copied_ahead


def batches(count: int) -> list[Batch]:
    made = []
    for number in range(count):
        samples = np.arange(4 * number, 4 * number + 4)
        images = torch.full((4, 3, 8, 8), number, dtype=torch.uint8)
        made.append(Batch(0, number, images, torch.full((4,), number), samples, samples, ()))
    return made


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_cpu_gets_the_batches_themselves(count: int) -> None:
    made = batches(count)
    passed = list(copied_ahead(iter(made), torch.device("cpu")))
    assert len(passed) == count
    assert all(one is other for one, other in zip(passed, made, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_gpu_gets_equal_batches_in_order(count: int) -> None:
    passed = list(copied_ahead(iter(batches(count)), torch.device("cuda")))
    assert [int(batch.images_BCHW[0, 0, 0, 0]) for batch in passed] == list(range(count))
    assert all(batch.images_BCHW.is_cuda and batch.labels_B.is_cuda for batch in passed)
