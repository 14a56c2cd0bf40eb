"""Training, evaluation and foreign tars from URLs: the same weights as from a folder, or a single message."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from accelerate.state import AcceleratorState
from faulty_server import Fault, serving, until
from pictures import jpeg
from test_index import write_tar
from trainings import config_of, final_weights, rows

from wasteddp import cli, train
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.data.remote import folder as remote
from wasteddp.data.train_plan import plan_training
from wasteddp.settings import load
from wasteddp.sharding.index import index_folder
from wasteddp.training import dataloaders
from wasteddp.training.distributed.launcher import Processes
from wasteddp.training.watchdog import exits


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)


def arguments_of(folder: Path, location: str | Path, *overrides: str) -> list[str]:
    """Return the arguments of a short training from a folder or URL, in blocks, with short timeouts."""
    folder.mkdir(exist_ok=True)
    settings = ["data.block=10", "data.lanes=2", f"data.cache={folder / 'cache'}", "data.read_timeout_s=2", *overrides]
    return [*config_of(folder, location), *(part for setting in settings for part in ("--set", setting))]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def local(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that reads from the folder."""
    folder = tmp_path_factory.mktemp("local")
    assert train.main(arguments_of(folder, small_shards)) == 0
    assert not (folder / "cache").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    return final_weights(folder / "run")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    def message(arguments: list[str]) -> str:
        capsys.readouterr()
        assert train.main(arguments) == 2
        return capsys.readouterr().err

    return message


@pytest.fixture(params=["threads", pytest.param("processes", marks=pytest.mark.processes)])
def decoding(request: pytest.FixtureRequest) -> str:
    """The setting of the decoders; each test runs with both."""
    return f"data.workers=2 {request.param}"


def last_needed(shards: Path, arguments: list[str]) -> tuple[str, int]:
    """Return the training tar that the first epoch needs last, and the first step that needs it."""
    _, config, *overrides = arguments
    split = Manifest.load(shards).split("train")
    settings = load(config, overrides[1::2])
    plan = plan_training(split, settings.data, batch_size=settings.train.batch_size, seed=settings.run.seed)
    needed = [set(plan.shard_of(plan.step_samples(0, step)).tolist()) for step in range(plan.steps_per_epoch)]
    first_use = {number: step for step in reversed(range(len(needed))) for number in needed[step]}
    late = max(first_use, key=lambda number: first_use[number])
    assert first_use[late] >= 2, "the tests need a shard that the first steps do not need"
    return split.shards[late].tar, first_use[late]


def test_a_url_gives_the_weights_of_the_folder_and_evaluates(
    small_shards: Path, local: bytes, tmp_path: Path, decoding: str
) -> None:
    with serving(small_shards) as server:
        assert train.main(arguments_of(tmp_path, f"{server.url}/", decoding)) == 0
        assert final_weights(tmp_path / "run") == local
        used = Manifest.load(small_shards)
        wanted = {shard.tar for name in ("train", "val") for shard in used.split(name).shards}
        assert server.fetches() == dict.fromkeys(sorted(wanted), 1)
        assert cli.main(["evaluate", str(tmp_path / "run"), "--split", "test"]) == 0
        by_processes = ["--shards", server.url, "--workers", "2 processes"]
        assert cli.main(["evaluate", str(tmp_path / "run"), "--split", "val", *by_processes]) == 0
    for split, count in (("test", 10), ("val", 13)):
        metrics = json.loads((tmp_path / "run" / "evaluations" / split / "metrics.json").read_text())
        assert metrics["num_samples"] == count
        assert metrics["hashes"]["manifest"] == metrics["hashes"]["manifest_trained_on"]


def test_a_store_that_fails_now_and_then_changes_nothing(
    small_shards: Path, local: bytes, tmp_path: Path, decoding: str
) -> None:
    faults: tuple[Fault | None, ...] = ("500", None, "cut", "reset", None, "flip", "429", None)
    with serving(small_shards) as server:
        requests = 0

        def now_and_then(name: str, number: int) -> Fault | None:
            nonlocal requests
            requests += 1
            # damaged data can be detected only with a hash
            fault = faults[requests % len(faults)]
            return None if name == "manifest.json" and fault == "flip" else fault

        server.faults = now_and_then
        assert train.main(arguments_of(tmp_path, server.url, decoding)) == 0
    assert final_weights(tmp_path / "run") == local


def test_a_store_that_goes_away_ends_the_run_saved_and_it_goes_on_later(
    small_shards: Path, local: bytes, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    little_patience = ("data.read_attempts=2", "data.ahead_steps=1", "data.fetchers=1", "checkpoint.every_steps=0")
    last = Manifest.load(small_shards).split("val").shards[-1].tar  # first needed after the fourth step
    with serving(small_shards) as server:

        def go_away(name: str, number: int) -> Fault | None:
            if name != last:
                return None
            threading.Thread(target=server.shutdown).start()  # from now on connections are accepted and never answered
            return "reset"

        server.faults = go_away
        said = refused(arguments_of(tmp_path, server.url, *little_patience))
        assert f"{server.url}/{last} cannot be read at byte 0 of " in said
        assert "(attempt 2 of 2): " in said
    with serving(small_shards) as server:  # at another address: the manifest identifies the set
        assert train.main(arguments_of(tmp_path, server.url, *little_patience)) == 0
    assert final_weights(tmp_path / "run") == local


def test_a_store_that_refuses_ends_the_run_saved_where_it_stands(
    small_shards: Path, local: bytes, tmp_path: Path, refused: Callable[[list[str]], str], decoding: str
) -> None:
    late, first_use = last_needed(small_shards, arguments_of(tmp_path, small_shards))
    arguments = lambda url: arguments_of(  # noqa: E731
        tmp_path, url, "checkpoint.every_steps=0", "data.prefetch=1", "data.ahead_steps=1", decoding
    )
    with serving(small_shards) as server:
        server.faults = lambda name, number: "403" if name == late else None
        said = refused(arguments(server.url))
        assert f"{late} cannot be read at byte 0" in said
        assert "(attempt 1 of 5): 403 Forbidden" in said
        [saved] = (tmp_path / "run" / "checkpoints").glob("step-*")
        assert 1 <= int(saved.name[5:]) <= first_use
        server.faults = lambda name, number: None
        assert train.main(arguments(server.url)) == 0
    assert final_weights(tmp_path / "run") == local


@pytest.mark.parametrize("held_by", ["the reader", "the thread that fetches ahead"])
def test_a_signal_ends_the_wait_for_a_store_and_the_run_saves_and_goes_on_later(
    held_by: str,
    decoding: str,
    small_shards: Path,
    local: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exits, "STOP", stop := exits.StopRequest())
    monkeypatch.setattr(dataloaders, "STOP", stop)
    ahead = 1 if held_by == "the reader" else 32
    settings = ("checkpoint.every_steps=0", "data.prefetch=1", f"data.ahead_steps={ahead}")
    settings += (decoding, "data.read_timeout_s=120", "data.read_attempts=1")
    late, first_use = last_needed(small_shards, arguments_of(tmp_path, small_shards, *settings))
    with serving(small_shards) as server:
        asked_at, metrics = [0.0], tmp_path / "run" / "metrics.jsonl"

        def ask_to_stop() -> None:
            # wait for the start, which takes seconds: before the first step there is nothing to save
            until(lambda: metrics.exists() and metrics.read_text(), limit_s=120)
            time.sleep(1.0)
            asked_at[0] = time.monotonic()
            stop.signal_name = "SIGTERM"

        def stall(name: str, number: int) -> Fault | None:
            if name != late:
                return None
            threading.Thread(target=ask_to_stop, daemon=True).start()
            return "stall"

        server.faults = stall
        assert train.main(arguments_of(tmp_path, server.url, *settings)) == 75
        assert 0 < time.monotonic() - asked_at[0] < 30
        [saved] = (tmp_path / "run" / "checkpoints").glob("step-*")
        assert 1 <= int(saved.name[5:]) <= first_use
        assert (tmp_path / "run" / "RESUMABLE").exists()
        stop.signal_name = ""
        server.faults = lambda name, number: None
        assert train.main(arguments_of(tmp_path, server.url, *settings)) == 0
    assert final_weights(tmp_path / "run") == local


@pytest.mark.parametrize("is_check", [False, True])
def test_a_signal_ends_the_wait_for_a_manifest(
    is_check: bool, small_shards: Path, local: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = exits.StopRequest()
    for module in (exits, dataloaders):
        monkeypatch.setattr(module, "STOP", stop)
    settings = ("data.read_timeout_s=60", "data.read_attempts=1")
    with serving(small_shards) as server:

        def stall(name: str, number: int) -> Fault:
            threading.Timer(0.2, lambda: setattr(stop, "signal_name", "SIGTERM")).start()
            return "stall"

        server.faults = stall
        began = time.monotonic()
        assert train.main([*arguments_of(tmp_path, server.url, *settings), *["--check"] * is_check]) == 75
        assert time.monotonic() - began < 30
        assert (tmp_path / "run" / "RESUMABLE").exists() == (not is_check)
        assert not (tmp_path / "run.check").exists()
        stop.signal_name = ""
        server.faults = lambda name, number: None
        assert train.main(arguments_of(tmp_path, server.url, *settings)) == 0
    assert final_weights(tmp_path / "run") == local


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("split", ["train", "val"])
def test_two_processes_of_which_one_waits_for_a_store_leave_together(
    split: str, small_shards: Path, tmp_path: Path
) -> None:
    late, _ = last_needed(small_shards, arguments_of(tmp_path, small_shards))
    if split == "val":
        late = Manifest.load(small_shards).split("val").shards[-1].tar
    with serving(small_shards) as server:
        server.faults = lambda name, number: "stall" if name == late else None
        settings = ("data.read_timeout_s=60", "data.read_attempts=1")
        ranks = Processes.start(arguments_of(tmp_path, server.url, *settings), 2, tmp_path / "run")
        try:
            until(lambda: server.asked[late] or not ranks.are_running, limit_s=120)
            # with several ranks, a step starts when the batch of the next step is loaded
            last = 1 if split == "train" else 2
            until(lambda: any(tmp_path.glob(f"run/checkpoints/step-{last:08d}/complete.json")), limit_s=60)
            began = time.monotonic()
            ranks.send(signal.SIGTERM)
            assert ranks.wait() == (75, 75), ranks.log.read_text()
        finally:
            ranks.send(signal.SIGKILL)
        assert time.monotonic() - began < 30
    assert "stopped by SIGTERM at step" in ranks.log.read_text()


def test_a_missing_shard_is_one_message(
    small_shards: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    tar = Manifest.load(small_shards).split("train").shards[1].tar
    with serving(small_shards) as server:
        server.faults = lambda name, number: "404" if name == tar else None
        said = refused(arguments_of(tmp_path, server.url))
    assert "training samples could not be used, data.max_damaged is 0" in said
    assert f"{server.url}/{tar} cannot be read at byte 0 of" in said
    assert "404 Not Found" in said


def test_damaged_samples_are_replaced_as_in_a_folder(small_shards: Path, tmp_path: Path, decoding: str) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    manifest = Manifest.load(shards)
    with SplitReader(manifest, "train") as reader:
        offset = int(reader._index[2]["offset"])
    with (shards / manifest.split("train").shards[0].tar).open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 64)
    assert train.main(arguments_of(tmp_path / "local", shards, "data.max_damaged=9")) == 0
    with serving(shards) as server:
        assert train.main(arguments_of(tmp_path / "remote", server.url, decoding, "data.max_damaged=9")) == 0
    ours, theirs = (rows(tmp_path / name / "run")[-1]["train/damaged"] for name in ("remote", "local"))
    assert ours == theirs > 0
    assert final_weights(tmp_path / "remote" / "run") == final_weights(tmp_path / "local" / "run")


def test_a_cache_that_is_too_small_is_one_message_before_anything_starts(
    small_shards: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    with serving(small_shards) as server:
        said = refused(arguments_of(tmp_path, server.url, "data.cache_gb=1e-5"))
        assert server.fetches() == {}
    assert "bytes; data.cache_gb allows 10,000" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("maker", ["webdataset jpg+cls", "webdataset jpg+json", "img2dataset"])
def test_tars_of_other_tools_train_over_http_once_they_are_indexed(maker: str, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for split, count in (("train", 14), ("val", 6)):
        samples = [(f"{number:09d}", jpeg(number + 100 * (split == "val")), number % 2) for number in range(count)]
        if maker == "img2dataset":  # 00000.tar with 9-digit keys, and for each a caption and the fields of the table
            members = {}
            for key, image, label in samples:
                fields = {
                    "url": f"https://a/{key}",
                    "key": key,
                    "status": "success",
                    "label": ("glass", "metal")[label],
                }
                members |= {f"{key}.jpg": image, f"{key}.json": json.dumps(fields).encode(), f"{key}.txt": b"a bottle"}
            write_tar(folder / f"{split}-00000.tar", members)
            continue
        with webdataset.TarWriter(str(folder / f"{split}-000.tar")) as writer:
            for key, image, label in samples:
                labels = {"cls": label} if maker == "webdataset jpg+cls" else {"json": {"label": label}}
                writer.write({"__key__": key, "jpg": image, **labels})
    index_folder(folder, workers=1)
    with serving(folder) as server:
        overrides = ("train.batch_size=6", "train.epochs=1", "data.lanes=0", "data.block=1")
        assert train.main(arguments_of(tmp_path, server.url, *overrides)) == 0
    assert rows(tmp_path / "run")[-1]["val/samples"] == 6


def test_verify_names_what_is_damaged_at_a_url(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    with serving(shards) as server:
        assert cli.main(["verify", server.url]) == 0
        assert f"{server.url} is whole: 73 samples in" in capsys.readouterr().out
        with (shards / "train-000000.tar").open("r+b") as file:
            file.write(b"x")
        (shards / "val-000000.tar").write_bytes(b"")
        (shards / "test-000000.idx").unlink()
        with pytest.raises(SystemExit, match="2"):
            cli.main(["verify", server.url])
    said = capsys.readouterr().err
    assert "train-000000.tar: another sha256" in said
    assert "val-000000.tar cannot be read at byte 0 of" in said
    assert "test-000000.idx cannot be read at byte 0 of" in said
