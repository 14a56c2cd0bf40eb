"""A real training of two processes on W&B, with the real client, killed twice: one run, each row once, no secrets."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainings import CPU2, ROOT, config_of, kill_all, launch_command, rows
from wandb_server import KEY, ServedRun, WandbServer

from wasteddp.training.tracking import wandb_client

pytestmark = pytest.mark.slow
PLANTED = "Zq8-planted-secret-71"
SETTINGS = ("track.wandb=auto", "track.tags=[cpu, small]", "track.group=seeds", "track.images=4",
            "train.epochs=10", "evaluate.every_steps=10", "checkpoint.every_steps=5")  # fmt: skip
STEPS = 40


class Story:
    """The run's folder, the server after the run, and the output."""

    def __init__(self, run: Path, server: WandbServer, said: str) -> None:
        self.run, self.server, self.said = run, server, said

    @property
    def served(self) -> ServedRun:
        (only,) = self.server.runs.values()
        return only


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Iterator[Story]:
    """Kill the run when W&B has 6 rows and again at 16, then finish it. The working folder has a git remote with a
    token."""
    folder = tmp_path_factory.mktemp("tracked")
    remote = ["remote", "add", "origin", f"https://me:{PLANTED}@example.org/repo.git"]
    for command in (["init", "-q"], remote):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    arguments = config_of(folder, small_shards)
    arguments += [part for setting in SETTINGS for part in ("--set", setting)]
    with WandbServer() as server:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        planted = {"AWS_SECRET_ACCESS_KEY": PLANTED, "STORE_TOKEN": f"{PLANTED}-2", "WANDB_NOTES": "a note"}
        environment = {**clean, **server.environment, **planted, "HOME": str(folder), "PYTHONPATH": str(ROOT)}
        said = ""
        for rows_before_kill in (6, 16, None):
            with (folder / "said").open("w+") as output:
                process = subprocess.Popen(
                    launch_command(["--report", "--slow", *arguments], "--config_file", str(CPU2)),
                    cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
                while rows_before_kill and process.poll() is None and _count(server) < rows_before_kill:
                    time.sleep(0.02)
                if rows_before_kill:
                    kill_all(arguments)
                code = process.wait(timeout=200)
                output.seek(0)
                said += output.read()
            assert (code == 0) == (rows_before_kill is None), said
        assert server.unknown == []
        yield Story(folder / "run", server, said)


def _count(server: WandbServer) -> int:
    return sum(len(run.rows()) for run in list(server.runs.values()))


def test_each_row_is_there_once_with_its_numbers(story: Story) -> None:
    there, truth = story.served.rows(), rows(story.run)
    assert [row["_step"] for row in there] == [row["step"] for row in truth] == list(range(1, STEPS + 1))
    assert story.served.starts == 3
    assert story.said.count("W&B: online, run ") == 3
    for row, true in zip(there, truth, strict=True):
        # values that do not depend on the clock: a row that a kill undid stays as first sent, and is repeated equally
        for name in ("train/loss", "lr", "epoch", "train/grad_norm", "val/accuracy", "val/recall/glass", "best/value"):
            assert row.get(name) == true.get(name), (name, row["_step"])
        assert {name for name in row if not name.startswith("_")} >= true.keys() - {"step", "time_s"}


def test_figures_of_each_rank_are_gathered(story: Story) -> None:
    for row in rows(story.run):
        assert row["rank/0/images_per_s"] > 0
        assert row["rank/1/images_per_s"] > 0
        assert row["memory/peak_mb"] > 10
        shares = [row["rank/0/wait_fraction"], row["rank/1/wait_fraction"]]
        assert row["train/wait_fraction"] == pytest.approx(sum(shares) / 2)
        assert row["train/wait_fraction_max"] == max(shares)
        assert 0 < row["train/step_ms_p50"] <= row["train/step_ms_p95"]


def test_the_run_describes_itself(story: Story) -> None:
    run, kept = story.served, wandb_client.load_identity(story.run)
    assert (run.id, run.state, run.group, run.job_type) == (kept.id, "finished", "seeds", "train")
    assert sorted(run.tags) == ["cpu", "small"]
    config = {name: entry["value"] for name, entry in run.config.items() if name != "_wandb"}
    card = json.loads((story.run / "model" / "model.json").read_text())
    assert config["hashes"] == {name: card["hashes"][name] for name in ("manifest", "settings")}
    assert config["commit"] == card["hashes"]["code"]
    assert config["optimizer"]["lr"] == 0.01
    progress = next((story.run / "checkpoints").glob("*40/progress.json"))
    assert json.loads(progress.read_text())["tracker_id"] == kept.id
    best = max(row["val/accuracy"] for row in rows(story.run) if "val/accuracy" in row)
    assert run.summary()["best/val/accuracy"] == best


def test_pictures_and_artifacts_are_there(story: Story, small_shards: Path) -> None:
    run = story.served
    assert [row["_step"] for row in run.rows() if "train/augmented" in row] == [1]
    evaluated = [row["_step"] for row in run.rows() if "val/mistakes" in row]
    assert evaluated == [row["step"] for row in rows(story.run) if "val/loss" in row]
    counts = next(json.loads(data)["data"] for name, data in sorted(run.files.items()) if "confusion" in name)
    assert sum(count for _, _, count in counts) == 13
    shards, model = story.server.artifact("dataset"), story.server.artifact("model")
    (entry,) = shards.manifest["contents"].values()
    assert entry["ref"] == (small_shards / "manifest.json").resolve().as_uri()
    assert shards.metadata["samples"] == {"test": 10, "train": 50, "val": 13}
    assert set(shards.used_by) == {run.id}
    card = json.loads((story.run / "model" / "model.json").read_text())
    assert {"best", "latest", f"step-{card['trained']['step']}"} <= set(model.aliases)
    weights = f"model-{card['hashes']['weights'][:12]}.safetensors"
    assert model.files[weights] == (story.run / "model" / weights).read_bytes()


def test_no_planted_secret_is_in_a_file_or_a_request(story: Story) -> None:
    folder = story.run.parent
    files = [path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts]
    assert any(path.suffix == ".wandb" for path in files)
    places = [(str(path), path.read_bytes()) for path in files] + [("request", body) for body in story.server.traffic]
    assert len(places) > 100
    assert not [place for place, content in places if PLANTED.encode() in content or KEY.encode() in content]
