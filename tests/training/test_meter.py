"""The measurements between two rows: on each rank, without a synchronization before a row is due."""

from __future__ import annotations

import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import config_of

from wasteddp import settings, train
from wasteddp.training.distributed import startup
from wasteddp.training.meter import Meter, starved_fraction


class Waits(TorchDispatchMode):
    """The places where this thread read a number from a tensor, which synchronizes with a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.places.append("".join(traceback.format_stack(limit=6)))
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_until_a_row_is_due(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = Waits()
    at_first, before_row, after_row = [], [], []
    add, read = Meter.add, Meter.read

    def counted_add(self: Meter, loss: torch.Tensor) -> None:
        at_first.append(len(waits.places))
        add(self, loss)

    def counted_read(self: Meter, *arguments: Any) -> dict[str, float]:
        before_row.append(len(waits.places))
        row = read(self, *arguments)
        after_row.append(len(waits.places))
        return row

    monkeypatch.setattr(Meter, "add", counted_add)
    monkeypatch.setattr(Meter, "read", counted_read)
    rare = ["train.log_every_steps=100", "checkpoint.every_steps=0", "evaluate.every_steps=8"]
    arguments = [*config_of(tmp_path, small_shards), *(part for one in rare for part in ("--set", one))]
    with waits:
        assert train.main(arguments) == 0
    assert len(before_row) == 1
    assert len(at_first) == 16, "8 steps of 2 micro-batches"
    assert before_row[0] == at_first[0], waits.places[at_first[0] : before_row[0]]
    assert after_row[0] > before_row[0], "the row itself does: the count works"


def test_a_row_has_the_figures_of_each_rank(tmp_path: Path) -> None:
    runtime = startup.start_runtime(settings.parse("precision: fp32\nrun: {threads: 1}\ntrain: {batch_size: 8}"))
    meter = Meter(runtime.device)
    for _ in range(3):
        meter.add(torch.tensor(2.0))
        meter.step_done()
    alone = meter.read(runtime, 8)
    assert alone["train/loss"] == 2.0
    assert 0 <= alone["train/step_ms_p50"] <= alone["train/step_ms_p95"]
    assert alone["memory/peak_mb"] > 10
    assert not [name for name in alone if name.startswith("rank/")], "one rank needs no figures of its own"

    class Two:  # the values of a second rank that waited twice as long
        world_size, device = 2, runtime.device

        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return 2 * tensor

        def gather(self, share: Any) -> list[Any]:
            first = replace(
                share,
                wait_fraction=0.1,
                starved_fraction=0.5,
                p50_ms=10.0,
                p95_ms=20.0,
                peak_mb=100.0,
                images_per_s=50.0,
            )
            return [
                first,
                replace(
                    first,
                    wait_fraction=0.3,
                    starved_fraction=0.7,
                    p50_ms=12.0,
                    p95_ms=30.0,
                    peak_mb=90.0,
                    images_per_s=40.0,
                ),
            ]

    meter.add(torch.tensor(2.0))
    meter.step_done()
    both = meter.read(Two(), 8)  # type: ignore[arg-type]
    assert both["train/loss"] == 2.0
    assert both["train/wait_fraction"] == pytest.approx(0.2)
    assert (both["train/wait_fraction_max"], both["train/step_ms_p50"], both["train/step_ms_p95"]) == (0.3, 11.0, 30.0)
    assert both["train/starved_fraction"] == 0.7
    assert (both["rank/0/images_per_s"], both["rank/1/images_per_s"], both["memory/peak_mb"]) == (50.0, 40.0, 100.0)


@pytest.mark.parametrize(("wall_s", "cpu_s", "expected"), [(2, 0.5, 0.75), (2, 2, 0), (2, 2.001, 0), (0, 0, 0)])
def test_a_thread_that_waits_for_nothing_is_starved_where_it_is_on_no_core(
    wall_s: float, cpu_s: float, expected: float
) -> None:
    assert starved_fraction(wall_s, cpu_s) == expected


def test_only_a_forward_pass_can_starve_and_a_row_begins_again() -> None:
    runtime = startup.start_runtime(settings.parse("precision: fp32\nrun: {threads: 1}\ntrain: {batch_size: 8}"))
    meter = Meter(runtime.device)
    time.sleep(0.1)  # outside the forward pass: not counted
    assert meter.read(runtime, 8)["train/starved_fraction"] == 0
    with meter.forward():
        time.sleep(0.3)  # not on a core, as if others used the cores
    assert meter.read(runtime, 8)["train/starved_fraction"] > 0.9
    with meter.forward():
        begun_s = time.thread_time()
        while time.thread_time() < begun_s + 0.1:
            pass
    assert meter.read(runtime, 8)["train/starved_fraction"] < 0.9
