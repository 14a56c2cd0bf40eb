"""The largest micro-batch that fits on a GPU."""

from __future__ import annotations

from collections.abc import Callable

from gpu_waits import ON_A_GPU
from test_micro_batch import AUTO, START, real

from wasteddp import settings as settings_file
from wasteddp.training.micro_batch import attempt, choose_size

pytestmark = ON_A_GPU


def test_a_gpu_that_has_little_memory_left_takes_less(measured: Callable[[str], None]) -> None:
    settings = settings_file.parse(AUTO.to_yaml(), ["train.batch_size=8192", "data.image_size=224"])
    runtime, objective, model = real(settings)
    found, _ = choose_size(settings, runtime, objective, model, START)
    measured(f"{found.micro_batch} of 8192 images of 224 px fit at once: {settings.model.arch}, {found.precision}")
    assert 1 <= found.micro_batch < 8192
    attempt(
        found.micro_batch,
        runtime,
        objective,
        model,
        image_size=settings.data.image_size,
        optimizer=settings.optimizer.name,
    )
