"""A set of more shards than a process may open files is read, by a bounded number of open tars."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pictures import jpeg
from trainings import PROGRAM, config_of

from wasteddp.data.decoding.pool import DecodeServer
from wasteddp.data.loader import training_loader, training_steps
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.data.tars import LocalTars
from wasteddp.errors import DamagedSampleError, ShardError
from wasteddp.order.plan import TrainPlan
from wasteddp.sharding.build import Job, Options, make_shards

NUM_SHARDS, LIMIT = 160, 100  # a shard has one image
ROOT = Path(__file__).parents[2]
NARROW = (
    "import sys; sys.path.insert(0, 'tests/support'); import narrow; narrow.install(); "
    "from wasteddp.cli import main; sys.exit(main())"
)

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a set whose train split has `NUM_SHARDS` shards, and whose val split has two."""
    folder = tmp_path_factory.mktemp("many")
    for split, count in (("train", NUM_SHARDS), ("val", 2)):
        for number in range(count):
            image = folder / "images" / split / ("glass", "metal")[number % 2] / f"{number}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(jpeg(1000 * (split == "val") + number, size=(24, 20)))
    make_shards(Job(folder / "images", folder / "set", Options(shard_mb=0.001)), workers=1)
    assert len(Manifest.load(folder / "set").split("train").shards) == NUM_SHARDS
    return folder / "set"


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_the_bytes_are_those_of_all_tars_open_and_few_are_open(many: Path) -> None:
    manifest = Manifest.load(many)
    shards = manifest.split("train").shards
    order = np.random.default_rng(0).integers(NUM_SHARDS, size=1000).tolist()
    with SplitReader(manifest, "train") as reader:
        expected = [reader.read(sample) for sample in order]
    before = open_files()
    with (
        SplitReader(manifest, "train", LocalTars(many, shards, most_open=7)) as reader,
        ThreadPoolExecutor(4) as threads,
    ):
        assert list(threads.map(reader.read, order)) == expected
        assert open_files() <= before + 7
    assert open_files() == before


def test_a_tar_that_is_in_use_stays_open(many: Path) -> None:
    tars = LocalTars(many, Manifest.load(many).split("train").shards, most_open=2)
    with tars.open_shard(0) as first, tars.open_shard(1), tars.open_shard(2), tars.open_shard(3):
        start = os.pread(first, 512, 0)
        for number in range(10, 20):
            tars.pread(number, 10, 0)
        assert os.pread(first, 512, 0) == start
        with tars.open_shard(0) as again:
            assert again == first
    tars.close()


def test_a_tar_that_is_removed_or_replaced_later_is_named(many: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(many, tmp_path / "set"))
    shards = Manifest.load(copy).split("train").shards
    tars = LocalTars(copy, shards, most_open=2)
    with SplitReader(Manifest.load(copy), "train", tars) as reader:
        (copy / shards[5].tar).unlink()
        (copy / shards[6].tar).unlink()
        os.mkfifo(copy / shards[6].tar)
        with pytest.raises(DamagedSampleError, match=f"{shards[5].tar}.*cannot be opened: No such file"):
            reader.read(5)
        with pytest.raises(DamagedSampleError, match=f"{shards[6].tar}.*it is a pipe or a device"):
            reader.read(6)
        with pytest.raises(ShardError, match=f"{shards[5].tar} cannot be opened"), reader.open_shard(5):
            pass


@pytest.fixture(scope="module")
def server() -> Iterator[DecodeServer]:
    with DecodeServer() as found:
        yield found


def test_processes_yield_the_batches_of_threads_and_need_few_tars_at_once(
    many: Path, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of all shards, for one process: as one task, it would need all of them at once."""
    most = [0]
    shards = Manifest.load(many).split("train").shards

    class Counted(LocalTars):
        def _make_room(self) -> None:
            super()._make_room()
            most[0] = max(most[0], len(self._recent))  # the lock is held

    plan = TrainPlan(NUM_SHARDS, NUM_SHARDS, 0, 1)
    batches = []
    for processes in (None, server):
        tars = Counted(many, shards, most_open=10)
        with (
            SplitReader(Manifest.load(many), "train", tars) as reader,
            training_loader(
                reader, seed=0, crop_scale=(0.3, 1.0), crop_ratio=(0.75, 1.33), pin_memory=False, server=processes,
                processes=processes is not None, image_size_px=16, workers=1, prefetch=1,
            ) as loader,
        ):  # fmt: skip
            batches.append(list(loader.batches(training_steps(plan, 0, 2, rank=0, world_size=1))))
    for one, other in zip(*batches, strict=True):
        assert np.array_equal(one.images_BCHW.numpy(), other.images_BCHW.numpy())
    assert 10 < most[0] <= 128


def limited(*command: object) -> str:
    """Run a program that may open `LIMIT` files, and return what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_commands_read_it_with_fewer_open_files_than_shards(many: Path, tmp_path: Path) -> None:
    assert f"{NUM_SHARDS + 2} shard(s)" in limited("-m", "wasteddp", "verify", many)
    tars = Path(shutil.copytree(many, tmp_path / "tars", ignore=shutil.ignore_patterns("*.idx", "manifest.json")))
    limited("-m", "wasteddp", "index", tars)
    assert len(Manifest.load(tars).split("train").shards) == NUM_SHARDS
    sets = ("train.epochs=1", "train.batch_size=80", "data.block=1", "data.workers='1 processes'")
    arguments = [*config_of(tmp_path, many), *(word for one in sets for word in ("--set", one))]
    limited(PROGRAM, *arguments)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == NUM_SHARDS // 80
    words = ("evaluate", tmp_path / "run", "--split", "train", "--workers", "1 processes")
    assert "160 images" in limited("-c", NARROW, *words)
