"""With run.deterministic three ranks add their gradients in a fixed order, whatever the order of DDP's buckets."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainings import run_ranks

# DDP rebuilds its buckets after the first step of a start; apart from that the first and third step are equal.
PROGRAM = """
import os
import sys
import torch
from wasteddp import settings
from wasteddp.training.distributed import startup
from wasteddp.training.watchdog.exits import leave

overrides = ["precision=fp32", "run.threads=1", "train.batch_size=6", *sys.argv[1:]]
runtime = startup.start_runtime(settings.parse("", overrides))
torch.manual_seed(runtime.rank)
images = torch.randn(8, 67)
gradients = []
for steps in (1, 3):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(67, 67) for _ in range(6)])
    ddp, _ = runtime.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for _ in range(steps):
        model.zero_grad()
        runtime.accelerator.backward(ddp(images).square().sum())
    gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
torch.manual_seed(0)
alone = torch.nn.Sequential(*[torch.nn.Linear(67, 67) for _ in range(6)])
alone(images).square().sum().backward()
own = torch.cat([p.grad.reshape(-1) for p in alone.parameters()])
first, second, third = runtime.stack(own)
mean = (first + second + third) / 3
means = [torch.tensor([1.0 + runtime.rank]), torch.tensor([[0.5, 3.0 * runtime.rank]])]
runtime.average_(means)
if runtime.is_main:
    near = torch.allclose(gradients[0], mean, rtol=2e-2 if "ddp.compression=bf16" in overrides else 1e-4, atol=1e-3)
    exact, same = torch.equal(gradients[0], mean), torch.equal(*gradients)
    print("found", near, exact, same, [m.tolist() for m in means])
runtime.close()
leave(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "exact"), [(["ddp.bucket_mb=1"], True), (["ddp.compression=bf16", "ddp.bucket_mb=1"], False)]
)
def test_a_start_rounds_its_first_step_as_all_others(
    overrides: list[str], exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_ranks(["run.deterministic=true", *overrides], 3, program=tmp_path / "program.py")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("found"))
    assert line == f"found True {exact} True [[2.0], [[0.5, 3.0]]]"
