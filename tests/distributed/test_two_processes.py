"""Two CPU processes, some through the real launcher: the same samples and nearly the same weights as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from faulty_server import serving
from safetensors.torch import load
from trainings import CPU2, PROGRAM, config_of, final_weights, launch, rows, run_ranks, start_ranks

from wasteddp.data.manifest import Manifest
from wasteddp.data.train_plan import plan_training
from wasteddp.settings import load as load_settings


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = launch(config_of(folder, small_shards), "--config_file", str(CPU2))
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert "2 processes x 6 images x 1 accumulated" in done.stdout
    return folder / "run"


def test_two_processes_take_the_steps_of_one(two: Path, small_shards: Path, tmp_path: Path) -> None:
    assert run_ranks(config_of(tmp_path, small_shards)).returncode == 0
    one = tmp_path / "run"
    for theirs, ours in zip(rows(one), rows(two), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)
    # the first step starts from the same weights: only the order of a sum differs
    assert rows(two)[0]["train/loss"] == pytest.approx(rows(one)[0]["train/loss"], rel=1e-6)
    assert {row["val/samples"] for row in rows(two) if "val/samples" in row} == {13}
    weights_one, weights_two = (load(final_weights(run)) for run in (one, two))
    assert not [name for name in weights_two if name.startswith(("module.", "_orig_mod."))]
    for name, tensor in weights_one.items():
        if "running" not in name and "num_batches" not in name:  # different on each rank, saved as their mean
            assert torch.allclose(tensor, weights_two[name], atol=2e-3), name


def test_kill_9_of_two_processes_costs_nothing(two: Path, small_shards: Path, tmp_path: Path) -> None:
    arguments = config_of(tmp_path, small_shards)
    first, second = start_ranks(arguments, 2, stdout=subprocess.PIPE, text=True)
    with first, second:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("step 3/8"):  # printed before the save of step 3, and after that of step 1 is on disk
                first.kill()
                second.kill()
    assert rows(tmp_path / "run")[-1]["step"] < 8, "the run had ended before it was killed"
    assert run_ranks(arguments, 2).returncode == 0
    assert final_weights(tmp_path / "run") == final_weights(two)


def test_one_process_goes_on_where_two_were(two: Path, small_shards: Path, tmp_path: Path) -> None:
    arguments = [*config_of(tmp_path, small_shards), "--resume", str(two / "checkpoints" / "step-00000007")]
    done = run_ranks(arguments)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run")[-1]["train/loss"] == pytest.approx(rows(two)[-1]["train/loss"], rel=1e-3)


def test_a_mistake_is_reported_once_and_ends_every_rank(small_shards: Path, tmp_path: Path) -> None:
    done = run_ranks([*config_of(tmp_path, small_shards), "--set", "train.batch_size=13"], 2)
    assert done.returncode == 2
    assert done.stderr.count("error: train.batch_size is 13 and there are 2 processes") == 1


def test_a_launch_that_accelerate_cannot_join_is_one_message(small_shards: Path, tmp_path: Path) -> None:
    # what a launcher sets, without the address that Accelerate joins by
    environment = {**os.environ, "WORLD_SIZE": "2"}
    alone = forked.run([sys.executable, str(PROGRAM), *config_of(tmp_path, small_shards)], env=environment)
    assert alone.returncode == 2
    assert "error: the 2 processes that were launched cannot be joined" in alone.stderr


def remote_config(folder: Path, url: str, *overrides: str) -> list[str]:
    settings = [f"data.cache={folder / 'cache'}", "data.read_timeout_s=5", *overrides]
    return [*config_of(folder, url), *(part for setting in settings for part in ("--set", setting))]


def test_two_processes_read_a_url_through_one_cache(two: Path, small_shards: Path, tmp_path: Path) -> None:
    with serving(small_shards) as server:
        done = run_ranks(remote_config(tmp_path, server.url), 2)
    assert done.returncode == 0, done.stderr
    assert final_weights(tmp_path / "run") == final_weights(two)
    assert set(server.fetches(".tar").values()) == set(server.fetches(".idx").values()) == {1}


def test_what_one_rank_cannot_read_is_reported_once_and_ends_every_rank(small_shards: Path, tmp_path: Path) -> None:
    with serving(small_shards) as server:
        arguments = remote_config(
            tmp_path, server.url, "data.block=10", "data.lanes=2", "data.prefetch=1", "data.ahead_steps=1"
        )
        split = Manifest.load(small_shards).split("train")
        settings = load_settings(arguments[1], arguments[3::2])
        plan = plan_training(split, settings.data, batch_size=settings.train.batch_size, seed=settings.run.seed)
        of_0, of_1 = (  # shards that the ranks read in the first epoch
            {
                n
                for step in range(4)
                for n in plan.shard_of(plan.step_samples(0, step, rank=rank, world_size=2)).tolist()
            }
            for rank in (0, 1)
        )
        tar = split.shards[min(of_1 - of_0)].tar  # rank 0, which prints the errors, never reads it
        server.faults = lambda name, number: "403" if name == tar else None
        done = run_ranks(arguments, 2)
    assert done.returncode == 2
    assert done.stderr.count(f"error: {server.url}/{tar} cannot be read at byte 0 of") == 1
    assert "(attempt 1 of 5): 403 Forbidden" in done.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")), "what was trained until then is saved"


def test_balanced_and_growing_two_processes_see_the_images_of_one_and_prove_it(
    small_shards: Path, tmp_path: Path
) -> None:
    changes = ["data.balance=1", "schedule.start_size=16", "schedule.full_size_at=0.5", "train.max_micro_batch=0"]
    more = [part for setting in (*changes, "run.record_steps=true") for part in ("--set", setting)]
    seen = []
    for name, num in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        done = run_ranks([*config_of(tmp_path / name, small_shards), *more], num)
        assert done.returncode == 0, done.stderr
        assert "3 classes, 16 px, 32 px from epoch 1; " in done.stdout
        run = tmp_path / name / "run"
        assert [row["coverage/ok"] for row in rows(run) if "coverage/ok" in row] == [1, 1]
        steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
        seen.append([(step["samples"], step["images"]) for step in steps])
    assert len(seen[0]) == 8
    assert seen[0] == seen[1]
