"""Decisions of a start by the measured speed of the GPU: the precision, and whether to compile the network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_waits import ON_A_GPU
from test_two_ranks import launch as launch_sharing
from trainings import ROOT, config_of, launch

from wasteddp import settings as settings_file
from wasteddp.training.distributed import startup
from wasteddp.training.distributed.compilation import what_is_lacking

pytestmark = ON_A_GPU
CAN_COMPILE = pytest.mark.skipif(
    torch.cuda.is_available() and bool(what_is_lacking()), reason="torch.compile lacks something here"
)


def test_auto_takes_one_precision_and_leaves_no_trace(measured: Callable[[str], None]) -> None:
    settings = settings_file.parse("run: {threads: 1}\ntrain: {batch_size: 256, max_micro_batch: 256}")
    torch.zeros(1, device="cuda")
    random, taken = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    runtime = startup.start_runtime(settings)
    measured(f"precision auto, ResNet50, 224 px, 256 images, eager: {runtime.precision} ({runtime.precision_reason})")
    assert runtime.precision in ("bf16", "fp16")
    assert runtime.images_per_s > 0
    assert (runtime.accelerator.scaler is not None) == (runtime.precision == "fp16")
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert torch.cuda.memory_allocated() - taken < 100e6  # cuBLAS keeps a workspace; the weights take 100 MB


def arguments_of(folder: Path, shards: Path, *overrides: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    return [*config_of(folder, shards), *(part for override in overrides for part in ("--set", override))]


def last_progress(run: Path) -> dict[str, Any]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    progress: dict[str, Any] = json.loads((newest / "progress.json").read_text())
    return progress


@pytest.mark.slow
def test_a_run_in_fp16_goes_on_in_fp16_with_its_loss_scale(small_shards: Path, tmp_path: Path) -> None:
    whole = launch(arguments_of(tmp_path / "whole", small_shards, "precision=fp16"))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "fp16 (as set)" in whole.stdout
    first = launch(arguments_of(tmp_path / "cut", small_shards, "precision=fp16", "train.stop_at_step=4"))
    assert first.returncode == 0, first.stdout + first.stderr
    second = launch(arguments_of(tmp_path / "cut", small_shards, "precision=auto"))
    assert second.returncode == 0, second.stdout + second.stderr
    assert "fp16 (as in the checkpoint)" in second.stdout
    assert "not compiled (" in second.stdout
    then, now = (last_progress(tmp_path / name / "run") for name in ("whole", "cut"))
    assert then["step"] == now["step"] == 8
    assert then["scaler"] == now["scaler"] is not None


@pytest.mark.slow
def test_a_run_in_bf16_goes_on_in_bf16(small_shards: Path, tmp_path: Path) -> None:
    first = launch(arguments_of(tmp_path, small_shards, "precision=bf16", "train.stop_at_step=4"))
    assert first.returncode == 0, first.stdout + first.stderr
    second = launch(arguments_of(tmp_path, small_shards, "precision=auto"))
    assert second.returncode == 0, second.stdout + second.stderr
    assert "bf16 (as in the checkpoint)" in second.stdout
    assert last_progress(tmp_path / "run")["scaler"] is None


@pytest.mark.slow
def test_two_ranks_take_what_the_first_one_found(small_shards: Path, tmp_path: Path) -> None:
    said = launch_sharing(2, arguments_of(tmp_path, small_shards, "precision=auto"))
    assert said.count("without compilation: bf16 ") == 1
    assert "not compiled (" in said


LEARNS = """
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from wasteddp.training.distributed.compilation import keep_compiled_code
from wasteddp.training.build_model import compile_in_place
torch.manual_seed(1)
images = torch.randn(8, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
labels = torch.arange(8, device="cuda") % 3
states = []
for compiled in (False, True):
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).cuda().to(memory_format=torch.channels_last)
    if compiled:
        compile_in_place(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
    states.append(model.state_dict())
eager, compiled = states
assert list(eager) == list(compiled)
print(max(float((eager[name].float() - compiled[name].float()).abs().max()) for name in eager))
"""


@pytest.mark.slow
@CAN_COMPILE
def test_a_compiled_network_learns_nearly_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Callable[[str], None]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    apart = float(run(LEARNS)[0])
    measured(f"largest difference of a weight, eager and compiled, after four steps in fp32: {apart:.1e}")
    assert apart < 2e-2


def run(program: str) -> list[str]:
    """Run a program in its own process: torch warns, and keeps compiled code. Return the words of its last line."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


PROGRAM = """
import time
import torch
from torch import nn
from torch._dynamo.utils import counters
from wasteddp.model import networks
from wasteddp.training.distributed.compilation import keep_compiled_code
from wasteddp.training.build_model import compile_in_place
model = networks.build("resnet50", 6).cuda().to(memory_format=torch.channels_last).train()
images = torch.randn(64, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
keep_compiled_code()
compile_in_place(model)
began = time.perf_counter()
with torch.autocast("cuda", torch.bfloat16):
    loss = model(images).float().square().mean()
torch.autograd.backward(loss)
torch.cuda.synchronize()
made = sum(counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("miss", "bypass"))
print(time.perf_counter() - began, made)
"""


@pytest.mark.slow
@CAN_COMPILE
def test_a_second_start_finds_the_compiled_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Callable[[str], None]
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    for _ in range(2):
        seconds, made = run(PROGRAM)
        found.append((float(seconds), int(made)))
    (first_s, first_made), (second_s, second_made) = found
    measured(f"first step of a compiled ResNet50: {first_s:.1f} s, with the code of the start before {second_s:.1f} s")
    assert first_made > 0
    assert second_made == 0
    assert second_s < first_s
