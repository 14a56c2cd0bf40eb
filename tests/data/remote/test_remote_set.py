"""Sets at a URL: what is read, what is fetched and when, and how damage is handled."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FaultyServer, serving, until

from wasteddp.data import dataset
from wasteddp.data.dataset import ShardSet, cache_folder
from wasteddp.data.loader import training_steps
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.errors import DamagedSampleError, RemoteError, SettingsError, ShardError
from wasteddp.order.plan import TrainPlan
from wasteddp.settings import Data

ROOT = Path(__file__).parents[3]


@pytest.fixture
def server(small_shards: Path) -> Iterator[FaultyServer]:
    with serving(small_shards) as running:
        yield running


@pytest.fixture
def data(server: FaultyServer, tmp_path: Path) -> Callable[..., Data]:
    def make(**settings: object) -> Data:
        settings = {"read_timeout_s": 2.0, "read_attempts": 2, **settings}
        return Data.model_validate({"shards": server.url, "cache": str(tmp_path / "cache"), **settings})

    return make


def train_shards(shards: Path) -> list[str]:
    return [shard.tar for shard in Manifest.load(shards).split("train").shards]


def test_it_reads_what_the_folder_holds_and_fetches_each_file_once(
    server: FaultyServer, data: Callable[..., Data], small_shards: Path
) -> None:
    for attempt in range(2):
        with (
            SplitReader(Manifest.load(small_shards), "train") as local,
            dataset.open_dataset(data()) as shards,
            shards.reader("train") as reader,
        ):
            assert shards.manifest.sha256 == Manifest.load(small_shards).sha256
            assert reader.labels.tolist() == local.labels.tolist()
            for sample in range(reader.num_samples):
                assert reader.read(sample) == local.read(sample)
                assert reader.source(sample) == local.source(sample)
                assert reader.describe(sample).startswith(f"{server.url}/train-00000")
        assert server.fetches(".tar") == dict.fromkeys(train_shards(small_shards), 1)
        assert set(server.fetches(".idx").values()) == {1}
        assert server.asked["manifest.json"] == attempt + 1


@pytest.mark.parametrize("of", ["folder", "url"])
def test_a_copy_is_read_instead_of_its_set_and_refused_for_another(
    server: FaultyServer, data: Callable[..., Data], small_shards: Path, tmp_path: Path, of: str
) -> None:
    settings = data(staged=str(tmp_path / "copy"), shards=server.url if of == "url" else str(small_shards))
    with pytest.raises(SettingsError, match="there is no such folder on this machine"):
        dataset.open_dataset(settings).__enter__()
    shutil.copytree(small_shards, tmp_path / "copy")
    for original in (settings.shards, f"{settings.shards}/gone"):  # a copy is also for a set that cannot be reached
        with dataset.open_dataset(settings.model_copy(update={"shards": original})) as shards:
            assert shards.manifest.folder == tmp_path / "copy"
    manifest = tmp_path / "copy" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(SettingsError, match=r"is not a copy of data\.shards"):
        dataset.open_dataset(settings).__enter__()


def steps_of(reader: SplitReader, plan: TrainPlan, *, in_flight: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """Take every step of two epochs, read all its samples, and return them."""
    steps = training_steps(plan, 0, 2 * plan.steps_per_epoch, rank=rank, world_size=world_size)
    taken = []
    for _, _, samples in reader.ahead(steps, in_flight=in_flight):
        for sample in samples.tolist():
            reader.read(sample)
            taken.append(sample)
    return taken


def test_a_rank_fetches_the_shards_of_its_lanes_alone_and_no_further_ahead_than_it_may(
    server: FaultyServer, data: Callable[..., Data], small_shards: Path
) -> None:
    plan = TrainPlan(50, 2, seed=0, lanes=2, block=10)
    with dataset.open_dataset(data(ahead_steps=4)) as shards, shards.reader("train") as reader:
        steps = list(training_steps(plan, 0, 25, rank=1, world_size=2))
        needed = [{shards.manifest.split("train").shards[n].tar for n in reader.shards_of(s[2])} for s in steps]
        assert len(set.union(*needed[:5])) < len(train_shards(small_shards)), "the test needs a shard that comes later"
        followed = reader.ahead(steps, in_flight=1)
        for number in range(20):
            next(followed)
            within_reach = set.union(*needed[: number + 5])
            until(lambda soon=within_reach: soon <= set(server.fetches()))  # type: ignore[misc]
            assert set(server.fetches()) == within_reach
    assert set(server.fetches().values()) == {1}


def test_a_small_cache_is_never_exceeded_and_every_sample_is_read(
    server: FaultyServer, data: Callable[..., Data], small_shards: Path
) -> None:
    plan = TrainPlan(50, 2, seed=0, lanes=1, block=10)
    sizes = [shard.num_bytes for shard in Manifest.load(small_shards).split("train").shards]
    assert len(sizes) >= 4
    limit = 3 * max(sizes)
    with dataset.open_dataset(data(cache_gb=limit / 1e9)) as shards, shards.reader("train") as reader:
        taken = steps_of(reader, plan, in_flight=1)
        assert shards._cache.used_bytes() <= limit  # type: ignore[attr-defined]
    expected = [plan.step_samples(epoch, step).tolist() for epoch in (0, 1) for step in range(25)]
    assert taken == [sample for step in expected for sample in step]
    assert max(server.fetches().values()) > 1, "the test needs a cache that is too small for the set"


def test_a_cache_too_small_for_what_is_read_at_once_is_refused_with_numbers(data: Callable[..., Data]) -> None:
    with dataset.open_dataset(data(cache_gb=2e-5)) as shards, shards.reader("train") as reader:
        everything = reader.needs(np.arange(50))
        with pytest.raises(SettingsError) as caught:
            shards.require_room([reader.needs(np.arange(2)), everything], [{"0" * 64: 1000}])
    num_bytes = sum(everything.values()) + 1000
    assert f"need {len(everything) + 1} shards, {num_bytes:,} bytes; data.cache_gb allows 20,000" in caught.value.found
    assert f"set data.cache_gb to {num_bytes / 1e9 + 0.0005:.3f} or more" in caught.value.remedy


_READ_ALL = """
import sys
from wasteddp.data import dataset as shard_set
from wasteddp.settings import Data
with shard_set.open_dataset(Data(shards=sys.argv[1], cache=sys.argv[2])) as shards, shards.reader("train") as reader:
    print("ready", flush=True)
    sys.stdin.readline()
    print(sum(len(reader.read(sample)) for sample in range(reader.num_samples)))
"""


def test_processes_that_share_a_cache_fetch_each_shard_once(
    server: FaultyServer, data: Callable[..., Data], small_shards: Path
) -> None:
    command = [sys.executable, "-c", _READ_ALL, server.url, data().cache]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    said = [process.communicate("go\n")[0] for process in processes]
    with SplitReader(Manifest.load(small_shards), "train") as reader:
        assert said == [f"{sum(len(reader.read(sample)) for sample in range(50))}\n"] * 2
    assert server.fetches(".tar") == dict.fromkeys(train_shards(small_shards), 1)
    assert set(server.fetches(".idx").values()) == {1}


def test_bytes_damaged_in_the_cache_are_fetched_again(
    server: FaultyServer, data: Callable[..., Data], small_shards: Path
) -> None:
    shard = Manifest.load(small_shards).split("train").shards[0]
    with dataset.open_dataset(data()) as shards, shards.reader("train") as reader:
        good = reader.read(2)
        with (Path(data().cache) / shard.sha256).open("r+b") as file:
            file.seek(int(reader._index[2]["offset"]))
            file.write(b"bad")
        assert reader.read(2) == good
    assert server.fetches()[shard.tar] == 2


def test_a_bit_that_is_wrong_in_the_store_costs_its_sample_alone(
    data: Callable[..., Data], small_shards: Path, tmp_path: Path
) -> None:
    tar = train_shards(small_shards)[0]
    with SplitReader(Manifest.load(small_shards), "train") as local:
        image = int(local._index[0]["offset"])
    shutil.copytree(small_shards, tmp_path / "set")
    with (tmp_path / "set" / tar).open("r+b") as file:
        file.seek(image + 5)
        file.write(b"\0")
    with serving(tmp_path / "set") as server:
        with dataset.open_dataset(data(shards=server.url)) as shards, shards.reader("train") as reader:
            for _ in range(2):
                with pytest.raises(DamagedSampleError, match=rf"{server.url}/{tar}, sample 0 .* not have the sha256"):
                    reader.read(0)
                reader.read(1)
        assert server.fetches()[tar] == 3, "fetched again, in case the way was at fault, and then no more"


def test_a_shard_that_is_not_there_damages_its_samples_and_is_asked_for_once(
    server: FaultyServer, data: Callable[..., Data], small_shards: Path
) -> None:
    tar = train_shards(small_shards)[1]
    server.faults = lambda name, number: "404" if name == tar else None
    with dataset.open_dataset(data()) as shards, shards.reader("train") as reader:
        first = shards.manifest.split("train").shards[0].num_samples
        reader.read(first - 1)
        for sample in (first, first + 1):
            with pytest.raises(DamagedSampleError, match=rf"{tar}, sample {sample - first} .*: 404 Not Found"):
                reader.read(sample)
    assert server.fetches()[tar] == 1


def test_a_store_that_is_gone_is_an_error_of_its_own(data: Callable[..., Data], small_shards: Path) -> None:
    with serving(small_shards) as server:
        settings = data(shards=server.url)
        with dataset.open_dataset(settings) as shards, shards.reader("train") as reader:
            server.faults = lambda name, number: "503"
            with pytest.raises(RemoteError, match=r"train-000000.tar cannot be read .*\(attempt 2 of 2\): 503 Service"):
                reader.read(0)
            server.faults = lambda name, number: None
            reader.read(0)


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("manifest.json", "404", r"manifest\.json cannot be read \(attempt 1 of 2\): 404 (.|\n)*wasteddp index"),
        ("manifest.json", "403", r"403 Forbidden(.|\n)*permission to read there"),
        ("manifest.json", "flip", "is not a manifest of this format"),
        ("train-000001.idx", "flip", r"the index http.*train-000001.idx has \d+ bytes and sha256"),
        ("train-000001.idx", "cut", r"train-000001.idx cannot be read .*\(attempt 2 of 2\): ClientPayloadError"),
    ],
)
def test_a_set_that_cannot_be_opened_names_the_reason(
    server: FaultyServer, data: Callable[..., Data], name: str, fault: str, message: str
) -> None:
    server.faults = lambda asked, number: fault if asked == name else None
    with pytest.raises(ShardError, match=message), dataset.open_dataset(data()) as shards:
        shards.reader("train")


def test_closing_does_not_wait_for_a_stalled_store(data: Callable[..., Data], server: FaultyServer) -> None:
    plan = TrainPlan(50, 2, seed=0, lanes=1)
    with dataset.open_dataset(data(read_timeout_s=100, read_attempts=4)) as shards, shards.reader("train") as reader:
        server.faults = lambda name, number: "stall"
        steps = reader.ahead(training_steps(plan, 0, 5, rank=0, world_size=1), in_flight=1)
        next(steps)  # `steps` is kept, since a deleted iterator fetches nothing
        until(lambda: server.fetches())


def test_the_caches_folder_is_resolved_on_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert cache_folder("") == Path("/x/wasteddp")
    assert cache_folder("$SCRATCH/shards") == Path("/scratch/me/shards")
    assert cache_folder("~/shards") == Path.home() / "shards"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(SettingsError, match=r"data.cache is '\$SCRATCH/shards', which is"):
        cache_folder("$SCRATCH/shards")


def test_a_local_set_needs_no_cache(small_shards: Path, tmp_path: Path) -> None:
    settings = Data(shards=str(small_shards), cache=str(tmp_path / "cache"), cache_gb=1e-9)
    with dataset.open_dataset(settings) as shards, shards.reader("val") as reader:
        assert type(shards) is ShardSet
        shards.require_room([reader.needs(np.arange(13))])
        assert reader.num_samples == 13
    assert not (tmp_path / "cache").exists()
