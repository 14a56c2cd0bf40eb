"""Decoding workers: the default, and the same results of `evaluate` and `predict` with threads and processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrow import __file__ as NARROW
from rich.console import Console
from small_run import CARD, overwrite_image, random_weights, write_image, write_images, write_run

from wasteddp.cli import main
from wasteddp.data.dataset import ShardSet
from wasteddp.data.decoding.workers import DecodeServer, Workers, default_workers, start_workers
from wasteddp.data.manifest import Manifest
from wasteddp.errors import DamagedSampleError
from wasteddp.inference import evaluate as evaluating
from wasteddp.inference import predict as predicting
from wasteddp.inference.bundle import save_bundle
from wasteddp.inference.classifier import Classifier, device_type
from wasteddp.inference.evaluate import evaluate, evaluate_split

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[3]
THREADS = Workers(2)


@pytest.fixture(scope="module")
def server() -> Iterator[DecodeServer]:
    with DecodeServer() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("finished"))


# --- how many, and of which kind -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "threads", "processes"), [(1, 1, 1), (2, 2, 1), (4, 4, 3), (5, 5, 3), (8, 8, 6), (16, 8, 14), (64, 8, 24)]
)
def test_the_default_leaves_cores_to_the_process_that_computes(cores: int, threads: int, processes: int) -> None:
    assert default_workers(cores, processes=False) == threads
    assert default_workers(cores, processes=True) == processes


@pytest.mark.parametrize(
    ("asked", "device", "number", "processes"),
    [
        (0, "cpu", 2, False),
        (0, "cuda", 1, True),
        ("3", "cpu", 3, False),
        ("3", "cuda", 3, True),
        ("3 threads", "cuda", 3, False),
        ("2 processes", "cpu", 2, True),
        ("0 processes", "mps", 1, True),
    ],
)
def test_workers_are_of_the_kind_that_is_right_or_named(
    asked: int | str, device: str, number: int, processes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wasteddp.data.decoding.workers.num_usable_cores", lambda: 2)
    with start_workers(asked, device) as workers:
        assert (workers.number, workers.server is not None) == (number, processes)


@pytest.mark.parametrize("workers", ["-1", "3 thread", "many", "3processes", "3 processes or so", ""])
@pytest.mark.parametrize("command", [["evaluate", "runs/absent"], ["predict", "runs/absent", "photo.jpg"]])
def test_other_workers_are_refused(command: list[str], workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, f"--workers={workers}"])
    assert stopped.value.code == 2
    assert f"{workers!r} is neither N nor 'N threads' nor 'N processes'" in capsys.readouterr().err


def test_the_device_is_known_before_it_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_type(name) for name in ("auto", "cuda:1", "cpu", "mps")] == ["cuda", "cuda", "cpu", "mps"]
    assert not torch.cuda.is_initialized()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_type("auto") == "cpu"


@pytest.mark.parametrize(
    ("module", "command"), [(evaluating, ["evaluate", "runs/x"]), (predicting, ["predict", "runs/x", __file__])]
)
def test_the_server_is_started_before_the_model_goes_to_the_device(
    module: Any, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    class Stop(Exception):
        pass

    @contextmanager
    def start(asked: int | str, device: str, **_: int) -> Iterator[Workers]:
        events.append((asked, device))
        yield THREADS
        events.append("closed")

    def load(*_: Any, **__: Any) -> Classifier:
        events.append("model")
        raise Stop

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "start_workers", start)
    monkeypatch.setattr(Classifier, "load", load)
    with pytest.raises(Stop):
        main([*command, "--workers", "5"])
    assert events == [("5", "cuda"), "model"]


# --- evaluate ---------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_evaluate_writes_the_same_bytes_by_processes(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, outputs = run / "evaluations" / "test", []
    for workers in ("2 threads", "2 processes"):
        shutil.rmtree(folder, ignore_errors=True)
        assert main(["evaluate", str(run), "--workers", workers]) == 0
        outputs.append((files_of(folder), capfd.readouterr()))
    assert len(outputs[0][0]) == 4
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("content", "is_in_index", "reason"),
    [(b"flipped", False, "do not have the sha256 of the index"), (b"no image at all", True, "unreadable: ")],
)
def test_damage_ends_an_evaluation_in_the_same_words(
    run: Path, server: DecodeServer, tmp_path: Path, content: bytes, is_in_index: bool, reason: str
) -> None:
    folder = Path(shutil.copytree(run.parent / "shards", tmp_path / "shards"))
    overwrite_image(folder, content, fix_index=is_in_index)
    shards = ShardSet(Manifest.load(folder))
    classifier, words = Classifier.load(run, device="cpu"), []
    for workers in (THREADS, Workers(2, server)):
        with pytest.raises(DamagedSampleError) as refused:
            evaluate_split(classifier, shards, "test", Console(), workers)
        words.append(str(refused.value))
    assert words[0] == words[1]
    assert reason in words[0]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_workers(server: DecodeServer) -> int:
    found = children(server.pid)
    for worker in found:
        os.kill(worker, signal.SIGKILL)
    return len(found)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_workers_that_are_killed_change_no_evaluation(
    run: Path, server: DecodeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluating, "_STEP", 2)
    classifier, shards = (
        Classifier.load(run, device="cpu", batch_size=1),
        ShardSet(Manifest.load(run.parent / "shards")),
    )
    kills = 0

    def kill() -> None:
        nonlocal kills
        kills += kill_workers(server)

    split, found = shards.manifest.split("test"), []
    for workers, advance in ((THREADS, lambda: None), (Workers(2, server), kill)):
        with shards.reader("test") as reader:
            found.append(evaluate(classifier, reader, split, workers=workers, advance=advance))
    ours, others = found
    assert kills >= 8
    assert "a new one replaces it" in capfd.readouterr().err
    assert np.array_equal(ours.probabilities_NK, others.probabilities_NK)
    assert ours.sources == others.sources
    assert np.array_equal(ours.seen.confusion, others.seen.confusion)


# --- predict ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with good and bad files, more than are in flight at the same time."""
    folder = write_images(tmp_path_factory.mktemp("photos"), {"some": (30, 20, 12)})
    (folder / "some" / "glass" / "empty.jpg").write_bytes(b"")
    (folder / "some" / "metal" / "cut.jpg").write_bytes((folder / "some" / "metal" / "1.jpg").read_bytes()[:-200])
    (folder / "some" / "text.png").write_text("hello")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return folder


def test_predict_writes_the_same_bytes_by_processes(
    run: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written = []
    command = [
        "predict",
        str(run),
        str(photos),
        str(photos / "some" / "*" / "1*.jpg"),
        str(photos / "some" / "text.png"),
    ]
    for workers in ("2 threads", "2 processes"):
        out = ["--csv", str(tmp_path / "out.csv"), "--json", str(tmp_path / "out.json")]
        assert main([*command, *out, "--workers", workers]) == 0
        written.append((files_of(tmp_path), capfd.readouterr()))
        for path in tmp_path.iterdir():
            path.unlink()
    assert written[0] == written[1]
    assert "cut.jpg: truncated" in written[0][1].out
    assert "gone.jpg: unreadable: No such file or directory" in written[0][1].out


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
@pytest.mark.slow
def test_workers_that_are_killed_change_no_prediction(
    run: Path, photos: Path, server: DecodeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    classifier, paths = Classifier.load(run, device="cpu"), predicting.find_images([str(photos)] * 4)
    all_paths, found, kills = list(paths), [], 0
    for number, one in enumerate(predicting.predict(classifier, all_paths, Workers(2, server))):
        found.append(one)
        if number % 32 == 0:
            kills += kill_workers(server)
    assert kills >= 8
    assert "a new one replaces it" in capfd.readouterr().err
    expected = list(predicting.predict(classifier, all_paths, THREADS))
    for ours, others in zip(found, expected, strict=True):
        assert type(ours) is type(others)
        assert ours.path == others.path
        if isinstance(ours, predicting.Failure) or isinstance(others, predicting.Failure):
            assert ours == others
        else:
            assert ours.probabilities.tobytes() == others.probabilities.tobytes()


# --- processes and files that remain ----------------------------------------------------------------------------------


def in_session(session: int) -> list[str]:
    """Return the processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
@pytest.mark.parametrize(("how", "code"), [("success", 0), ("error", 2), ("SIGINT", 130)])
def test_no_process_and_no_file_is_left(tmp_path: Path, how: str, code: int) -> None:
    save_bundle(tmp_path / "model", CARD, random_weights())
    for name in ("photos", "out", "tmp"):
        (tmp_path / name).mkdir()
    photo = write_image(tmp_path / "photo.jpg", 1)
    if how == "error":  # none of the files can be read
        photo.write_text("hello")
    for number in range(20_000 if how == "SIGINT" else 10):
        (tmp_path / "photos" / f"{number:05}.jpg").hardlink_to(photo)
    command = ["predict", "model", "photos", "--csv", "out/answers.csv", "--workers", "2 processes", "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, NARROW, "-m", "wasteddp.cli", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        if how == "SIGINT":
            for _ in range(20):
                process.stdout.readline()
            assert len(in_session(process.pid)) == 4  # the command, the server and two workers
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all of them
        _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    end = time.monotonic() + 10
    while in_session(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not in_session(process.pid)
    assert not list((tmp_path / "tmp").iterdir())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ([] if how == "SIGINT" else ["answers.csv"])
    if how == "SIGINT":
        assert errors == "interrupted\n"
