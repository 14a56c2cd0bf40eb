"""Ranks that differ in what each reads from its own disk are refused, with the name of what differs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from trainings import PROGRAM, ROOT, config_of

from wasteddp.errors import LaunchError
from wasteddp.settings import parse
from wasteddp.training import build_model
from wasteddp.training.distributed import startup
from wasteddp.training.distributed.launcher import free_port, rank_environment
from wasteddp.training.distributed.runtime import refuse_different

REMEDY = "start every rank with the same command"


@pytest.mark.parametrize("change", ["optimizer.lr=0.2", "augment.mixup=0.5", "train.epochs=7", "precision=bf16"])
def test_another_setting_is_named_with_its_rank(change: str) -> None:
    key = change.partition("=")[0]
    found = [startup.facts_of(parse("")), startup.facts_of(parse("", [change])), startup.facts_of(parse(""))]
    with pytest.raises(LaunchError, match=f"rank 1: {key} is ") as caught:
        refuse_different(found, REMEDY)
    assert "rank 2" not in str(caught.value)


@pytest.mark.parametrize("change", ["run.threads=3", "data.shards=/local/set", "data.cache=/scratch", "data.workers=2"])
def test_what_belongs_to_a_machine_may_differ(change: str) -> None:
    refuse_different([startup.facts_of(parse("")), startup.facts_of(parse("", [change]))], REMEDY)


def test_one_changed_line_of_code_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = startup.facts_of(parse(""))
    program = ROOT / "wasteddp" / "training" / "objective.py"
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + b"#" * (path == program))
    startup._hash_of_code.cache_clear()
    try:
        with pytest.raises(LaunchError, match="rank 1: the code's hash is"):
            refuse_different([before, startup.facts_of(parse(""))], REMEDY)
    finally:
        startup._hash_of_code.cache_clear()


def test_weights_and_buffers_are_in_the_hash() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = build_model.hash_of_state(model)
    for tensor in (model[0].weight.data, model[1].running_var, model[1].num_batches_tracked):
        kept = tensor.clone()
        tensor.add_(1)
        assert build_model.hash_of_state(model) != before
        tensor.copy_(kept)
    assert build_model.hash_of_state(model) == before


@pytest.mark.processes
def test_two_real_ranks_end_with_what_differs(small_shards: Path, tmp_path: Path) -> None:
    """Each for itself: other settings, and a model of the same classes from another file."""
    port, processes = free_port(), []
    for rank, change in enumerate(("optimizer.lr=0.01", "optimizer.lr=0.02")):
        command = [sys.executable, str(PROGRAM), *config_of(tmp_path, small_shards), "--set", change]
        environment = os.environ | rank_environment(rank, 2, port)
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    found = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert [code for _, code in found] == [2, 2]
    assert any("rank 1: optimizer.lr is 0.02, on rank 0 0.01" in text for text, _ in found)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
