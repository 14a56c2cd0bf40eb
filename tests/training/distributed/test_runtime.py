"""Precision with its reason, and threads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wasteddp import parallel, settings
from wasteddp.errors import LaunchError
from wasteddp.training.distributed import startup
from wasteddp.training.distributed.precision import NOTHING_KEPT, choose, refuse_impossible
from wasteddp.training.distributed.runtime import has_gpu


@pytest.mark.parametrize(
    ("asked", "has_bf16", "precision", "reason"),
    [
        ("auto", True, "bf16", "this CPU, with AVX512-BF16 or AMX, supports it"),
        ("auto", False, "fp32", "this CPU, without AVX512-BF16 and AMX, does not support bf16"),
        (
            "bf16",
            False,
            "bf16",
            "as set; this CPU, without AVX512-BF16 and AMX, emulates it, which is slower than fp32",
        ),
        ("fp32", True, "fp32", "as set"),
    ],
)
def test_precision_on_a_cpu_comes_with_its_reason(
    asked: str, has_bf16: bool, precision: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_bf16)
    chosen = choose(asked, has_gpu=False, kept=NOTHING_KEPT, measure=lambda _: {})
    assert (chosen.name, chosen.reason) == (precision, reason)


def test_fp16_is_refused_where_the_launch_names_the_cpu_of_a_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert has_gpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(LaunchError, match="precision is fp16 and there is no GPU"):
        startup.start_runtime(settings.parse("precision: fp16"))


def test_fp16_without_a_gpu_is_refused() -> None:
    with pytest.raises(LaunchError, match="precision is fp16 and there is no GPU"):
        refuse_impossible("fp16", has_gpu=False)


@pytest.mark.parametrize(
    ("others", "threads"),
    [
        ([], 8),
        ([("here", range(8)), ("here", range(8))], 2),
        ([("there", range(8))], 8),  # of another machine
        ([("here", range(8, 16)), ("here", range(16, 24))], 8),  # pinned to their own cores
        ([("here", range(4))], 4),
        ([("here", range(8))] * 20, 1),
    ],
)
def test_ranks_share_the_cores_that_several_may_use(
    others: list[tuple[str, range]], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = SimpleNamespace(gather=lambda mine: [mine, *((name, frozenset(cores)) for name, cores in others)])
    before = torch.get_num_threads()
    monkeypatch.setattr(startup, "usable_cores", lambda: frozenset(range(8)))
    monkeypatch.setattr(startup, "num_usable_cores", lambda: 8)
    monkeypatch.setattr(startup.socket, "gethostname", lambda: "here")
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as set by accelerate launch
        assert startup._use_cores(0, runtime) == (torch.get_num_threads(), threads) == (threads, threads)  # type: ignore[arg-type]
        assert startup._use_cores(5, runtime) == (torch.get_num_threads(), threads) == (5, threads)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),  # a quota above the number of cores
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_container_uses_the_time_that_it_is_granted(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "usable_cores", lambda: frozenset(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert parallel.num_usable_cores(tmp_path) == cores


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        num_processes = 1

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(startup, "_join", lambda *_: Alone())
    with pytest.raises(LaunchError) as caught:
        startup.start_runtime(settings.parse("run: {threads: 1}"))
    assert "the launcher started 2 processes and Accelerate sees 1" in str(caught.value)
    assert "launch/accelerate/cpu2.yaml" in str(caught.value)
