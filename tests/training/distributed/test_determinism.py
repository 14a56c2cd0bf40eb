"""`run.deterministic`: its settings of torch, and two trainings on a CPU that end with the same bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trainings import config_of, final_weights, run_ranks

from wasteddp import settings as settings_file
from wasteddp.errors import SettingsError
from wasteddp.training.distributed import determinism
from wasteddp.training.watchdog.failures import explain

# A step with all random choices and sums: the operations of each policy, both kinds of mixing, and the moving average.
EVERYTHING = {
    "run.deterministic": "true",
    "run.record_steps": "true",
    "augment.policy": "trivialaugment",
    "augment.mixup": "0.2",
    "augment.cutmix": "1.0",
    "augment.erase": "0.3",
    "augment.brightness": "0.2",
    "train.class_weighting": "effective_number",
    "train.label_smoothing": "0.1",
    "train.ema_decay": "0.9",
    "optimizer.clip_norm": "1.0",
    "optimizer.adaptive_clip": "0.1",
    "model.stochastic_depth": "0.1",
    "schedule.start_size": "16",
}


def everything(folder: Path, shards: Path, **other: str) -> list[str]:
    """Return the arguments of a training in `folder / run`; `other` has __ for the dot."""
    folder.mkdir()
    changes = EVERYTHING | {key.replace("__", "."): value for key, value in other.items()}
    return config_of(folder, shards) + [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore torch's flags after the test."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.set_deterministic_debug_mode("default")
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_as_before")
def test_torch_cublas_cudnn_and_nccl_are_reported() -> None:
    torch.backends.cudnn.benchmark = True
    determinism.demand(compiles=False)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"


@pytest.mark.parametrize(("found", "left"), [(":16:8", ":16:8"), (":4096:8", ":4096:8"), (":8:1", ":4096:8")])
@pytest.mark.usefixtures("_as_before")
def test_a_workspace_that_torch_would_refuse_is_replaced(
    found: str, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", found)
    determinism.demand(compiles=False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == left


@pytest.mark.usefixtures("_as_before")
def test_the_compiler_is_reported_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor, "deterministic", False)
    determinism.demand(compiles=False)
    assert not inductor.deterministic
    determinism.demand(compiles=True)
    assert inductor.deterministic


@pytest.mark.usefixtures("_as_before")
def test_an_operation_that_torch_refuses_names_what_to_set() -> None:
    determinism.demand(compiles=False)
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    error = explain(raised.value, settings_file.parse("run: {deterministic: true}"), "computing")
    assert isinstance(error, SettingsError)
    assert "run.deterministic is set" in error.found
    assert "while computing: put_" in error.found
    assert "the same bits" in error.consequence
    assert "set run.deterministic to false" in error.remedy


def test_other_errors_are_not_taken_for_it() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert explain(error, settings_file.parse("run: {deterministic: true}"), "computing") is error


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2], ids=["one rank", "two ranks"])
def test_two_trainings_on_a_cpu_end_with_the_same_bits(
    num: int, tmp_path: Path, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runs = []
    for name, deterministic in (("one", "true"), ("other", "false")):
        done = run_ranks(everything(tmp_path / name, small_shards, run__deterministic=deterministic), num)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("(as set), deterministic;" in done.stdout) == (deterministic == "true")
        runs.append(tmp_path / name / "run")
    one, other = runs
    assert (one / "steps.jsonl").read_bytes() == (other / "steps.jsonl").read_bytes()
    assert len((one / "steps.jsonl").read_text().splitlines()) == 8
    assert final_weights(one) == final_weights(other)
