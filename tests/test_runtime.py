"""Precision with its reason, and threads."""

from __future__ import annotations

import pytest
import torch

from wasteddp import settings
from wasteddp.errors import LaunchError
from wasteddp.training import runtime


@pytest.mark.parametrize(
    ("asked", "has_bf16", "precision", "reason"),
    [
        ("auto", True, "bf16", "this CPU, with AVX512-BF16 or AMX, computes it"),
        ("auto", False, "fp32", "this CPU, without AVX512-BF16 and AMX, does not compute bf16"),
        ("bf16", False, "bf16", "as set; this CPU, without AVX512-BF16 and AMX, emulates it, slower than fp32"),
        ("fp32", True, "fp32", "as set"),
    ],
)
def test_precision_on_a_cpu_comes_with_its_reason(
    asked: str, has_bf16: bool, precision: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_bf16)
    assert runtime.choose_precision(asked, has_gpu=False) == (precision, reason)


def test_fp16_without_a_gpu_is_refused() -> None:
    with pytest.raises(LaunchError, match="precision is fp16 and there is no GPU"):
        runtime.choose_precision("fp16", has_gpu=False)


def test_the_cores_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(runtime, "num_usable_cores", lambda: 8)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as accelerate launch sets it
        assert runtime._use_all_cores(0) == torch.get_num_threads() == 8
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        assert runtime._use_all_cores(0) == 2
        assert runtime._use_all_cores(5) == 5
    finally:
        torch.set_num_threads(before)


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        num_processes = 1

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runtime, "_join", lambda *_: Alone())
    with pytest.raises(LaunchError) as caught:
        runtime.start(settings.parse("run: {threads: 1}"))
    assert "the launcher started 2 processes and Accelerate sees 1" in str(caught.value)
    assert "launch/accelerate/cpu2.yaml" in str(caught.value)
