"""The settings of the gradients' communication, on two CPU processes."""

from __future__ import annotations

from pathlib import Path

from trainings import run_ranks

# The script of each rank: a model whose gradients are 1/3 on rank 0 and 1 on rank 1.
PROGRAM = """
import sys
import torch
from wasteddp import settings
from wasteddp.training.distributed import startup
from wasteddp.training.watchdog.exits import leave

overrides = ["precision=fp32", "run.threads=1", "train.batch_size=4", *sys.argv[1:]]
runtime = startup.start_runtime(settings.parse("", overrides))
model = torch.nn.Linear(5, 3, bias=False)
ddp, _ = runtime.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
runtime.accelerator.backward(ddp(torch.full((1, 5), 1.0 if runtime.rank else 1 / 3)).sum())
if runtime.is_main:
    (gradient,) = set(model.weight.grad.flatten().tolist())
    print("found", ddp.bucket_bytes_cap, gradient)
runtime.close()
leave(0)  # as in train.py: otherwise a rank sometimes aborts in the destructors of torch's threads
"""


def run(tmp_path: Path, *overrides: str) -> tuple[int, float]:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_ranks(list(overrides), 2, program=tmp_path / "program.py")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("found"))
    return int(line.split()[1]), float(line.split()[2])


def test_gradients_are_averaged_in_fp32_in_buckets_of_25_mib_by_default(tmp_path: Path) -> None:
    num_bytes, gradient = run(tmp_path)
    assert num_bytes == 25 * 2**20
    assert abs(gradient - 2 / 3) < 1e-7


def test_compressed_gradients_are_rounded_to_bf16_and_buckets_have_the_size_set(tmp_path: Path) -> None:
    num_bytes, gradient = run(tmp_path, "ddp.compression=bf16", "ddp.bucket_mb=3")
    assert num_bytes == 3 * 2**20
    assert gradient == 0.66796875  # 171 / 256, which is 2/3 in 8 bits
