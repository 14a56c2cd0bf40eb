"""W&B through its real client, with a test server: one run and each row once, whatever happens in between."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest
from PIL import Image
from tracked import LABEL, log, tracker_of
from trainings import rows
from wandb_server import KEY, WandbServer

from wasteddp import cli
from wasteddp.training.tracking import pictures
from wasteddp.training.tracking.wandb_client import sender_lock

HERE = Path(__file__).parents[2] / "support"


def forget() -> None:
    """Reset wandb as in a new process, because it reads its environment once."""
    import wandb

    with contextlib.suppress(ConnectionError, SystemExit):  # its service was killed
        wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]


@pytest.fixture(autouse=True)
def _nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide the key, netrc and settings of the user, and leave nothing to the next test."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    forget()
    yield
    forget()


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as running:
        yield running
        assert running.unknown == []


@pytest.fixture
def synced(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `wasteddp sync` as a new process would, and return its output."""

    def sync(folder: Path, server: WandbServer, *options: str, code: int = 0) -> str:
        forget()
        os.environ.update(server.environment)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            raise SystemExit(cli.main(["sync", str(folder), *options]))
        said = capsys.readouterr()
        assert end.value.code == code, said.err
        return said.out + said.err

    return sync


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the timeout only ends a test that would hang."""
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "it did not happen within two minutes"
        time.sleep(0.05)


def exactly(server: WandbServer, folder: Path) -> None:
    """The server has the rows of metrics.jsonl: the same steps in the same order, each once, with the same losses."""
    there = server.runs["run1"].rows()
    assert [row["_step"] for row in there] == [row["step"] for row in rows(folder)]
    assert [row["train/loss"] for row in there] == [row["train/loss"] for row in rows(folder)]


def child(folder: Path, server: WandbServer, first: int, last: int, resumed: int, end: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "tracked.py"), str(folder), str(first), str(last), str(resumed), end]
    environment = {**os.environ, **server.environment, "PYTHONPATH": str(HERE.parents[1])}
    return forked.Popen(command, env=environment, stdin=forked.PIPE, stdout=forked.PIPE, text=True)


@pytest.mark.processes
def test_online_has_rows_pictures_facts_and_best_values(
    tmp_path: Path, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.update(server.environment)
    tracker = tracker_of(tmp_path / "run")
    pixels = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(pixels, "JPEG")
    seen = pictures.Picture(pixels.getvalue(), {"true": "glass"})
    wrong = {"source": "a/1.jpg", "true": "glass", "predicted": "metal", "probability": 0.75}
    tracker.show(0, lambda: pictures.Gallery("augmented", [seen], ("glass", "metal")))
    log(tracker, 1, 4)
    mistake = pictures.Picture(pixels.getvalue(), wrong)
    tracker.show(5, lambda: pictures.Gallery("mistakes", [mistake], ("glass", "metal"), [[2, 1], [0, 3]]))
    log(tracker, 5, 12)
    tracker.close(0)
    assert "W&B: online, run run1 (an API key is set)" in capsys.readouterr().out
    exactly(server, tmp_path / "run")
    run = server.runs["run1"]
    assert (run.state, run.group, run.job_type) == ("finished", "seeds", "train")
    assert sorted(run.tags) == ["cpu", "small"]
    assert run.config["optimizer"]["value"] == {"lr": 0.1}
    assert run.rows()[0]["train/augmented"]["captions"] == ["glass"]
    assert [row["_step"] for row in run.rows() if "val/mistakes" in row] == [5]
    table = next(json.loads(data) for name, data in run.files.items() if "mistakes" in name)
    assert table["data"][0][1:] == ["a/1.jpg", "glass", "metal", 0.75]
    counts = next(json.loads(data) for name, data in run.files.items() if "confusion" in name)
    assert counts["data"] == [
        ["glass", "glass", 2],
        ["glass", "metal", 1],
        ["metal", "glass", 0],
        ["metal", "metal", 3],
    ]
    assert sum(name.endswith(".jpg") for name in run.files) == 1, "one picture: the other one is in the table"
    summary = run.summary()
    assert (summary["best/val/accuracy"], summary["best/val/loss"]) == (0.10, 0.1)
    shards = server.artifact("dataset")
    assert shards.name == "shards-sample-set"
    reference = shards.manifest["contents"]["manifest-000000000000.json"]["ref"]
    assert reference == "shards+file:///shards/sample/manifest.json", "it is not on this machine"
    assert shards.used_by == ["run1"]
    assert not shards.files, "by reference: nothing of the data is sent"


@pytest.mark.processes
def test_without_a_key_it_is_offline_without_a_prompt_and_is_sent_later(
    tmp_path: Path, server: WandbServer, synced: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    tracker = tracker_of(folder)  # a prompt would fail: pytest's stdin cannot be read
    log(tracker, 1, 6)
    tracker.close(0)
    said = capsys.readouterr().out
    assert "W&B: offline, run run1 (no API key: set WANDB_API_KEY or run `wandb login`)" in said
    assert f"send it later with: wasteddp sync {folder}" in said
    assert len(list(folder.glob("wandb/offline-run-*-run1/*.wandb"))) == 1
    forget()
    with pytest.raises(SystemExit):
        cli.main(["sync", str(folder)])
    assert "could not be sent to W&B: no API key" in capsys.readouterr().err
    assert "sent 6 of 6 rows" in synced(folder, server)
    exactly(server, folder)
    assert server.runs["run1"].state == "finished"
    assert "sent 0 of 6 rows" in synced(folder, server)
    exactly(server, folder)
    # the files that `wandb sync` would send again are marked as sent
    fragments = list(folder.glob("wandb/*run-*-run1/*.wandb"))
    assert any(path.parent.name.startswith("offline-run-") for path in fragments)
    assert all(path.with_name(f"{path.name}.synced").exists() for path in fragments)


@pytest.mark.processes
def test_a_wrong_key_is_offline_and_the_right_one_sends_later(
    tmp_path: Path, server: WandbServer, synced: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.update({**server.environment, "WANDB_API_KEY": "b" * 40})
    tracker = tracker_of(tmp_path / "run")
    log(tracker, 1, 3)
    tracker.close(0)
    said = capsys.readouterr().out
    assert said.count("W&B: ") == 1
    assert "W&B: offline, run run1 (" in said
    assert "b" * 40 not in said
    assert not server.runs
    synced(tmp_path / "run", server)
    exactly(server, tmp_path / "run")


def test_a_host_that_does_not_answer_is_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with WandbServer() as gone:
        os.environ.update(gone.environment)
    tracker = tracker_of(tmp_path)
    log(tracker, 1, 3)
    tracker.close(0)
    assert f"W&B: offline, run run1 ({gone.url} does not answer); send it later" in capsys.readouterr().out


@pytest.mark.processes
def test_rows_of_an_outage_arrive_afterwards(tmp_path: Path, server: WandbServer) -> None:
    os.environ.update(server.environment)
    tracker = tracker_of(tmp_path)
    log(tracker, 1, 3)
    wait_for(lambda: "run1" in server.runs and len(server.runs["run1"].rows()) == 3)
    server.refuse = True
    before = len(server.traffic)
    log(tracker, 4, 7)
    wait_for(lambda: len(server.traffic) > before)
    server.refuse = False
    log(tracker, 8, 9)
    tracker.close(0)
    exactly(server, tmp_path)


@pytest.mark.processes
def test_a_server_that_is_dead_at_the_end_does_not_hold_the_process(
    tmp_path: Path, server: WandbServer, synced: Callable[..., str]
) -> None:
    with child(tmp_path, server, 1, 3, 0, "finish") as process:
        wait_for(lambda: "run1" in server.runs and len(server.runs["run1"].rows()) == 3)
        server.refuse = True
        out, _ = process.communicate("end\n", timeout=120)  # track.finish_s is 4; without it this takes minutes
    assert process.returncode == 0
    assert f"not all data was sent within 4 s (track.finish_s); send it later with: wasteddp sync {tmp_path}" in out
    server.refuse = False
    assert server.runs["run1"].state == "running"
    assert "sent 0 of 3 rows" in synced(tmp_path, server)
    exactly(server, tmp_path)
    assert server.runs["run1"].state == "finished"


@pytest.mark.processes
def test_a_server_that_never_answers_holds_neither_the_loop_nor_the_end(
    tmp_path: Path, server: WandbServer, synced: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.update(server.environment)
    server.hang_s = 600  # a wait for it would time out
    tracker = tracker_of(tmp_path, finish_s=1)
    log(tracker, 1, 3)
    tracker.close(0)
    assert "not all data was sent within 1 s" in capsys.readouterr().out
    server.hang_s = 0
    synced(tmp_path, server)
    exactly(server, tmp_path)


@pytest.mark.processes
def test_killed_online_and_continued_offline_is_one_exact_run(
    tmp_path: Path, server: WandbServer, synced: Callable[..., str]
) -> None:
    with child(tmp_path, server, 1, 7, 0, "wait") as process:
        wait_for(lambda: "run1" in server.runs and len(server.runs["run1"].rows()) >= 3)
        process.kill()
    os.environ["WANDB_MODE"] = "offline"
    tracker = tracker_of(tmp_path, resumed_step=5)  # two rows that the server may have are undone and repeated
    log(tracker, 6, 12)
    tracker.close(75)
    synced(tmp_path, server)
    exactly(server, tmp_path)
    assert server.runs["run1"].state == "preempted"
    assert server.runs["run1"].summary()["best/val/accuracy"] == 0.10
    tracker = tracker_of(tmp_path, resumed_step=12)
    log(tracker, 13, 14)
    tracker.close(0)
    synced(tmp_path, server)
    exactly(server, tmp_path)
    assert list(server.runs) == ["run1"]


def test_two_senders_of_one_run_are_refused(tmp_path: Path, server: WandbServer, synced: Callable[..., str]) -> None:
    LABEL.save(tmp_path)
    lock = sender_lock(tmp_path, print)
    assert lock is not None
    with lock:
        assert "is sending its rows itself" in synced(tmp_path, server, code=2)
    assert not server.runs


def test_a_folder_without_a_run_is_one_message(tmp_path: Path, server: WandbServer, synced: Callable[..., str]) -> None:
    assert "tracking.json cannot be read" in synced(tmp_path, server, code=2)


def test_the_key_is_in_no_file_and_no_body(tmp_path: Path, server: WandbServer) -> None:
    os.environ.update(server.environment)
    tracker = tracker_of(tmp_path)
    log(tracker, 1, 2)
    tracker.close(0)
    assert server.traffic
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] + server.traffic
    assert not [text for text in texts if KEY.encode() in text]
