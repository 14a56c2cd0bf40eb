"""The moving average of the weights with two ranks, whose BatchNorm layers see different images."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from trainings import config_of, run_ranks


def test_two_ranks_keep_their_own_statistics_of_the_average_and_go_on_bit_for_bit(
    small_shards: Path, tmp_path: Path
) -> None:
    def arguments(name: str) -> list[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        more = ("train.ema_decay=0.5", "train.stop_at_step=5", "checkpoint.keep_last=9")
        settings = [part for override in more for part in ("--set", override)]
        return [*config_of(tmp_path / name, small_shards), *settings]

    done = run_ranks(arguments("undisturbed"), 2)
    assert done.returncode == 0, done.stderr
    undisturbed, again = (tmp_path / name / "run" / "checkpoints" for name in ("undisturbed", "again"))

    own = load_file(undisturbed / "step-00000003" / "ranks.safetensors")["ema_running_statistics"]
    average = load_file(undisturbed / "step-00000003" / "ema.safetensors")
    kept = torch.cat([tensor.reshape(-1) for name, tensor in average.items() if "running" in name])
    assert len(own) == 2
    assert not torch.equal(own[0], own[1])
    assert torch.allclose(own.mean(0).sort().values, kept.sort().values, atol=1e-6)

    shutil.copytree(undisturbed / "step-00000003", again / "step-00000003")
    done = run_ranks(arguments("again"), 2)
    assert done.returncode == 0, done.stderr
    for name in ("model", "ema", "ranks"):
        one, other = (folder / "step-00000005" / f"{name}.safetensors" for folder in (undisturbed, again))
        assert one.read_bytes() == other.read_bytes(), name
