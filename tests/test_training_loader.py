"""`wasteddp.TrainingLoader` in a plain PyTorch loop: the order, DDP on two processes, and a resumed loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainings import run_ranks

import wasteddp
from wasteddp.errors import CheckpointError, SettingsError

# A plain loop of two epochs under DDP; with a number as argument it stops after so many steps and saves.
PROGRAM = """
import hashlib, os, sys
from pathlib import Path
import torch
import wasteddp

shards, state, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
layers = torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 3)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
with wasteddp.TrainingLoader(shards, batch_size=12, image_size=32, seed=3) as loader:
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
    while loader.epoch < 2:
        for batch in loader:
            images, labels = loader.tensors(batch)
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with Path(f"{state}.{loader.rank}").open("a") as file:
                print(loader.step, batch.samples.tolist(), file=file)
            if loader.step == stop:
                if loader.rank == 0:
                    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save({**parts, "loader": loader.state_dict()}, state)
                torch.distributed.barrier()
                torch.distributed.destroy_process_group()
                sys.exit()
if loader.rank == 0:
    weights = torch.cat([p.flatten() for p in model.parameters()]).detach().numpy().tobytes()
    print("weights", hashlib.sha256(weights).hexdigest(), flush=True)
torch.distributed.destroy_process_group()
"""


def train(tmp_path: Path, shards: Path, state: str, stop: int) -> tuple[dict[tuple[int, int], list[int]], str]:
    """Return the samples of each (rank, step) so far, and the hash of the final weights or ''."""
    (tmp_path / "loop.py").write_text(PROGRAM)
    done = run_ranks([str(shards), str(tmp_path / state), str(stop)], 2, program=tmp_path / "loop.py")
    assert done.returncode == 0, done.stderr
    samples = {}
    for rank in (0, 1):
        for line in (tmp_path / f"{state}.{rank}").read_text().splitlines():
            step, numbers = line.split(maxsplit=1)
            assert (rank, int(step)) not in samples, "a step was trained twice"
            samples[rank, int(step)] = json.loads(numbers)
    return samples, done.stdout.partition("weights ")[2].strip()


def test_a_plain_loop_under_ddp_resumes_to_the_same_bits(tmp_path: Path, small_shards: Path) -> None:
    whole, weights = train(tmp_path, small_shards, "whole.pth", 0)
    first, _ = train(tmp_path, small_shards, "cut.pth", 3)
    both, resumed = train(tmp_path, small_shards, "cut.pth", 0)
    assert weights
    assert resumed == weights
    assert both == whole
    assert {step for _, step in first} == {1, 2, 3}
    for epoch in (0, 1):  # 4 steps of 12 of 50 images: none twice
        seen = [s for (_, step), samples in whole.items() if (step - 1) // 4 == epoch for s in samples]
        assert len(seen) == len(set(seen)) == 48


def test_the_batches_are_those_of_a_training_at_any_number_of_ranks(small_shards: Path) -> None:
    kwargs: dict[str, Any] = {"batch_size": 10, "image_size": 32, "seed": 5, "augment": {"vertical_flip": 0.5}}
    with wasteddp.TrainingLoader(str(small_shards), **kwargs) as alone:
        whole = [(batch.samples, *alone.tensors(batch)) for batch in alone]
        assert (len(whole), alone.steps_per_epoch, alone.epoch, len(alone)) == (5, 5, 1, 5)
        assert alone.classes == ("glass", "metal", "paper")
        position = alone.state_dict()
    parts: dict[int, Any] = {}
    for rank in (0, 1):
        with wasteddp.TrainingLoader(str(small_shards), **kwargs, rank=rank, world_size=2) as loader:
            loader.load_state_dict({**position, "step": 2})
            assert len(loader) == 3
            for number, batch in enumerate(loader, start=2):
                images, labels = loader.tensors(batch)
                for place, sample in enumerate(batch.samples.tolist()):
                    parts[number, sample] = images[place], labels[place]
    assert len(parts) == 30
    for number, (samples, images, labels) in enumerate(whole[2:], start=2):
        for place, sample in enumerate(samples.tolist()):
            np.testing.assert_array_equal(parts[number, sample][0].numpy(), images[place].numpy())
            assert parts[number, sample][1] == labels[place]


def test_a_state_of_another_order_and_settings_that_do_not_apply_are_refused(small_shards: Path) -> None:
    kwargs: dict[str, Any] = {"batch_size": 10, "image_size": 32}
    with wasteddp.TrainingLoader(str(small_shards), **kwargs) as loader:
        state = loader.state_dict()
        assert json.loads(json.dumps(state)) == state
        for change in (
            {"seed": 1}, {"manifest": "0" * 64}, {"step": -1}, {"step": "3"}, {"step": True}, {"step": 10**30},
            {"batch_size": 5},
        ):  # fmt: skip
            with pytest.raises(CheckpointError, match="another order"):
                loader.load_state_dict({**state, **change})
        with pytest.raises(CheckpointError, match="the state is a list"):
            loader.load_state_dict([1])  # type: ignore[arg-type]
        loader.load_state_dict({**state, "step": np.int64(1)})
        assert loader.step == 1
        loader.load_state_dict(state)
        first, second = iter(loader), iter(loader)
        places = [next(one).samples.tolist() for one in (first, second)]
        assert places == [loader._plan.step_samples(0, step).tolist() for step in (0, 1)]
        with pytest.raises(CheckpointError, match="an earlier `for`"):
            next(first)
    with pytest.raises(SettingsError, match="mixup"):
        wasteddp.TrainingLoader(str(small_shards), **kwargs, augment={"mixup": 0.2})
    with pytest.raises(SettingsError, match="3 processes and 10 lanes"):
        wasteddp.TrainingLoader(str(small_shards), **kwargs, rank=0, world_size=3)
    with pytest.raises(SettingsError, match="only one of rank"):
        wasteddp.TrainingLoader(str(small_shards), **kwargs, rank=0)
    for rank, world_size in ((5, 2), (-1, 2), (0, 0), ("0", "1")):  # the first one counted for ever
        with pytest.raises(SettingsError, match="give integers, with rank from 0"):
            wasteddp.TrainingLoader(str(small_shards), **kwargs, rank=rank, world_size=world_size)  # type: ignore
    with pytest.raises(SettingsError, match="data has image_size, which is an argument"):
        wasteddp.TrainingLoader(str(small_shards), batch_size=10, data={"image_size": 64})
    with pytest.raises(SettingsError, match="speed"):
        wasteddp.TrainingLoader(str(small_shards), **kwargs, data={"speed": 3})
