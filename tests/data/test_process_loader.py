"""Decoding processes yield the batches of threads, bit for bit, whatever happens to a process, its parent or memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing_view import KillingView

from wasteddp.data.batch import Batch
from wasteddp.data.decoding import worker as module
from wasteddp.data.decoding.crop import TrainingView
from wasteddp.data.decoding.worker import SharedMemory
from wasteddp.data.decoding.workers import DecodeServer
from wasteddp.data.loader import AnyLoader, Loader, evaluation_loader, evaluation_steps, training_loader, training_steps
from wasteddp.data.manifest import Manifest
from wasteddp.data.process_loader import ProcessLoader
from wasteddp.data.reader import SplitReader
from wasteddp.errors import DamagedSampleError, SettingsError, WorkerError
from wasteddp.order.plan import PADDING, EvaluationPlan, TrainPlan

pytestmark = pytest.mark.processes
PLAN = TrainPlan(50, 12, 0, 12)
VIEW = TrainingView(seed=0, scale=(0.3, 1.0), ratio=(0.75, 1.33))
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SUPPORT = HERE.parent / "support"  # also of processes that the tests start


@pytest.fixture(scope="module")
def server() -> Iterator[DecodeServer]:
    """Start one server for all tests, since importing torch takes seconds. It can import modules of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SUPPORT))
        with DecodeServer() as found:
            yield found


def loader_of(reader: SplitReader, server: DecodeServer | None, **how: Any) -> AnyLoader:
    how = {"image_size_px": 24, "workers": 2, "prefetch": 2, "processes": server is not None} | how
    return training_loader(
        reader, seed=0, crop_scale=(0.3, 1.0), crop_ratio=(0.75, 1.33), pin_memory=False, server=server, **how
    )


def run(shards: Path, server: DecodeServer | None, first: int = 0, last: int = 6, **how: Any) -> list[Batch]:
    with SplitReader(Manifest.load(shards), "train") as reader, loader_of(reader, server, **how) as loader:
        return list(loader.batches(training_steps(PLAN, first, last, rank=0, world_size=1)))


def require_equal(ours: list[Batch], others: list[Batch]) -> None:
    assert len(ours) == len(others) > 0
    for one, other in zip(ours, others, strict=True):
        assert (one.epoch, one.step_in_epoch, one.damage) == (other.epoch, other.step_in_epoch, other.damage)
        assert np.array_equal(one.samples, other.samples)
        assert np.array_equal(one.read_B, other.read_B)
        assert torch.equal(one.labels_B, other.labels_B)
        assert torch.equal(one.images_BCHW, other.images_BCHW)
        assert one.images_BCHW.is_contiguous(memory_format=torch.channels_last)
        assert one.encoded_B == other.encoded_B


def sha256_of(shards: Path, sample: int) -> str:
    with SplitReader(Manifest.load(shards), "train") as reader:
        return str(reader._index[sample]["sha256"].tobytes().hex())


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


# --- the same batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 2), (5, 4), (13, 1)])
def test_batches_are_those_of_threads(small_shards: Path, server: DecodeServer, workers: int, prefetch: int) -> None:
    require_equal(run(small_shards, server, workers=workers, prefetch=prefetch), run(small_shards, None))


def test_a_run_from_the_middle_and_sides_that_grow(small_shards: Path, server: DecodeServer) -> None:
    def side(epoch: int) -> int:
        return 24 + 16 * epoch

    for largest in (0, 56):  # memory is reserved once, or again after the side grows
        ours = run(small_shards, server, 3, 10, image_size_px=side, largest_px=largest)
        require_equal(ours, run(small_shards, None, 3, 10, image_size_px=side))
    assert {batch.images_BCHW.shape[2] for batch in ours} == {24, 40, 56}


def test_a_batch_that_is_kept_is_not_written_again(small_shards: Path, server: DecodeServer) -> None:
    with SplitReader(Manifest.load(small_shards), "train") as reader, loader_of(reader, server) as loader:
        kept, copies = [], []
        for batch in loader.batches(training_steps(PLAN, 0, 20, rank=0, world_size=1)):
            kept.append(batch.images_BCHW[2:7])
            copies.append(kept[-1].clone())
            kept = kept[-4:]  # more than there are slots, so slots are reused
            copies = copies[-4:]
            assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True)), "after the loader is closed"


def test_abandoned_batches_do_not_disturb_those_that_follow(small_shards: Path, server: DecodeServer) -> None:
    with SplitReader(Manifest.load(small_shards), "train") as reader, loader_of(reader, server) as loader:
        for _ in range(4):
            batches = loader.batches(training_steps(PLAN, 0, 6, rank=0, world_size=1))
            next(batches)
            batches.close()  # type: ignore[attr-defined]
        require_equal(list(loader.batches(training_steps(PLAN, 0, 6, rank=0, world_size=1))), run(small_shards, None))


def test_evaluation_pads_the_last_batch(small_shards: Path, server: DecodeServer) -> None:
    def batches(processes: bool) -> list[Batch]:
        with (
            SplitReader(Manifest.load(small_shards), "val") as reader,
            evaluation_loader(
                reader, image_size_px=24, resize_px=28, workers=2, processes=processes, server=server
            ) as loader,
        ):
            return list(loader.batches(evaluation_steps(EvaluationPlan(13, 8), rank=0, world_size=1)))

    require_equal(batches(True), batches(False))
    assert (batches(True)[1].read_B == PADDING).tolist() == [False] * 5 + [True] * 3


def test_what_is_left_to_the_device_is_left(small_shards: Path, server: DecodeServer) -> None:
    for size in (24, 8):  # a JPEG fits into its row, or does not
        ours = run(small_shards, server, on_device=True, image_size_px=size)
        threads = run(small_shards, None, on_device=True, image_size_px=size)
        assert all(all(batch.encoded_B) for batch in ours)
        for one, other in zip(ours, threads, strict=True):
            assert one.encoded_B == other.encoded_B
            assert np.array_equal(one.read_B, other.read_B)


# --- damage ---------------------------------------------------------------------------------------------------------


def damaged(shards: Path, tmp_path: Path, split: str, *samples: int) -> Path:
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    manifest = Manifest.load(copy)
    with SplitReader(manifest, split) as reader:
        numbers, index = reader.records(np.array(samples))
    for number, record in zip(numbers, index, strict=True):
        with (copy / manifest.split(split).shards[int(number)].tar).open("r+b") as file:
            file.seek(int(record["offset"]))
            file.write(b"\0" * 64)
    return copy


def test_damage_is_replaced_and_reported_as_threads_do(
    small_shards: Path, server: DecodeServer, tmp_path: Path
) -> None:
    shards = damaged(small_shards, tmp_path, "train", 3, 4, 20)
    ours = run(shards, server, 0, 8)
    require_equal(ours, run(shards, None, 0, 8))
    assert {(item.sample, item.replaced_by) for batch in ours for item in batch.damage} == {(3, 5), (4, 5), (20, 21)}


def test_damage_ends_an_evaluation(small_shards: Path, server: DecodeServer, tmp_path: Path) -> None:
    shards = damaged(small_shards, tmp_path, "val", 3)
    with (
        SplitReader(Manifest.load(shards), "val") as reader,
        evaluation_loader(reader, image_size_px=24, resize_px=28, workers=2, processes=True, server=server) as loader,
        pytest.raises(DamagedSampleError, match=r"val-000000.tar, sample 3 .* cannot be used"),
    ):
        list(loader.batches(evaluation_steps(EvaluationPlan(13, 8), rank=0, world_size=1)))


# --- death ----------------------------------------------------------------------------------------------------------


def deadly_run(
    shards: Path, server: DecodeServer, once: Path | None, *samples: int, replace: bool = True
) -> tuple[list[Batch], list[str]]:
    notes: list[str] = []
    view = KillingView(VIEW, frozenset(sha256_of(shards, sample) for sample in samples), once)
    with (
        SplitReader(Manifest.load(shards), "train") as reader,
        ProcessLoader(
            reader, view, image_size_px=24, workers=2, replace=replace, warn=notes.append, server=server
        ) as loader,
    ):
        return list(loader.batches(training_steps(PLAN, 0, 8, rank=0, world_size=1))), notes


def test_a_worker_that_is_killed_is_replaced_and_its_rows_are_decoded_again(
    small_shards: Path, server: DecodeServer, tmp_path: Path
) -> None:
    batches, notes = deadly_run(small_shards, server, tmp_path, 3, 4, 30)
    require_equal(batches, run(small_shards, None, 0, 8))
    assert len(notes) == 3
    assert "was killed by SIGKILL (out of memory?) at sample" in notes[0]


def test_a_sample_that_kills_two_workers_is_damaged_and_named(small_shards: Path, server: DecodeServer) -> None:
    batches, notes = deadly_run(small_shards, server, None, 3, 4)
    found = {(item.sample, item.replaced_by, item.reason) for batch in batches for item in batch.damage}
    assert {(sample, used) for sample, used, _ in found} == {(3, 5), (4, 5)}
    assert all(
        words == "it killed 2 decoding processes (the last was killed by SIGKILL (out of memory?))"
        for *_, words in found
    )
    assert all("train-000000.tar, sample " in item.where for batch in batches for item in batch.damage)
    assert notes
    for ours, others in zip(batches, run(small_shards, None, 0, 8), strict=True):
        same = ours.read_B == others.read_B
        assert (~same).sum() == len(ours.damage)
        assert torch.equal(ours.images_BCHW[torch.from_numpy(same)], others.images_BCHW[torch.from_numpy(same)])


def test_a_sample_that_kills_ends_what_may_not_replace(small_shards: Path, server: DecodeServer) -> None:
    with pytest.raises(DamagedSampleError, match=r"sample 3 .* killed 2 decoding processes"):
        deadly_run(small_shards, server, None, 3, replace=False)


def test_workers_of_a_killed_server_die_and_all_are_replaced(small_shards: Path) -> None:
    notes: list[str] = []
    with (
        SplitReader(Manifest.load(small_shards), "train") as reader,
        DecodeServer() as own,
        loader_of(reader, own, warn=notes.append) as loader,
    ):
        assert isinstance(loader, ProcessLoader)
        batches = []
        for batch in loader.batches(training_steps(PLAN, 0, 6, rank=0, world_size=1)):
            batches.append(batch)
            if len(batches) == 2:
                before = loader._pool.pids
                own._process.kill()
                assert wait_until(lambda: not any(map(is_alive, before)))  # noqa: B023
        require_equal(batches, run(small_shards, None))
        assert not set(before) & set(loader._pool.pids)
        assert len(notes) == 2
        assert all("with the server" in note for note in notes)


def test_workers_that_cannot_live_end_the_run_with_advice(
    small_shards: Path, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SplitReader(Manifest.load(small_shards), "train") as reader, loader_of(reader, server) as loader:
        assert isinstance(loader, ProcessLoader)
        monkeypatch.setattr("wasteddp.data.decoding.pool._send_task", lambda worker, *rest: os.kill(worker.pid, 9))
        with pytest.raises(WorkerError, match=r"10 times in a row(.|\n)*data.workers"):
            next(loader.batches(training_steps(PLAN, 0, 6, rank=0, world_size=1)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_workers_leave_signals_to_their_parent(small_shards: Path, server: DecodeServer, number: int) -> None:
    with SplitReader(Manifest.load(small_shards), "train") as reader, loader_of(reader, server) as loader:
        assert isinstance(loader, ProcessLoader)
        before = loader._pool.pids
        for pid in before:
            os.kill(pid, number)
        require_equal(list(loader.batches(training_steps(PLAN, 0, 6, rank=0, world_size=1))), run(small_shards, None))
        assert loader._pool.pids == before


_PARENT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:5]
from test_process_loader import *
reader = SplitReader(Manifest.load(Path(sys.argv[1])), "train")
loader = loader_of(reader, DecodeServer(), workers=3)
batches = loader.batches(training_steps(PLAN, 0, 1000, rank=0, world_size=1))
next(batches)
print(loader._pool.server.pid, *loader._pool.pids, flush=True)
for _ in batches: time.sleep(0.01)
"""


def test_a_parent_that_is_killed_leaves_no_process_and_no_file(small_shards: Path, tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    before = set(shm.iterdir()) if shm.is_dir() else set()
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(small_shards), str(HERE), str(SUPPORT), str(ROOT)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as parent:
        assert parent.stdout
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 4
        assert all(map(is_alive, pids))
        parent.kill()
    assert wait_until(lambda: not any(map(is_alive, pids)))
    assert list(tmp_path.iterdir()) == []
    assert not shm.is_dir() or not (set(shm.iterdir()) - before)


# --- memory ---------------------------------------------------------------------------------------------------------


def refuse(*arguments: Any) -> int:
    raise PermissionError(1, "Operation not permitted")


def test_without_memfd_a_file_without_a_name_takes_its_place(
    small_shards: Path, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = []
    for _ in range(3):
        kinds.append(SharedMemory(4096).kind)
        require_equal(run(small_shards, server), run(small_shards, None))
        monkeypatch.setitem(module._KINDS, kinds[-1], refuse)
    assert kinds == ["memfd", "/dev/shm", "a temporary file"]
    with pytest.raises(SettingsError, match=r"4,096 bytes(.|\n)*memfd: Operation not(.|\n)*TMPDIR(.|\n)*threads"):
        SharedMemory(4096)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root, to mount a small /dev/shm")
def test_a_small_dev_shm_is_passed_over_and_never_a_bus_error() -> None:
    code = (
        "import os; from wasteddp.data.decoding import worker as s\n"
        "s._KINDS.pop('memfd')\n"
        "memory = s.SharedMemory(4 << 20); memory.view(0, 4 << 20)[:] = 1; print(memory.kind)\n"
        "print(s.SharedMemory(1 << 19).kind)"
    )
    script = f'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} -c "$CODE"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=ROOT,
        env={**os.environ, "CODE": code},
        capture_output=True,
        text=True,
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert done.stdout.split("\n")[:2] == ["a temporary file", "/dev/shm"], done.stderr


# --- what a worker is doing -----------------------------------------------------------------------------------------


def test_the_sample_of_a_stuck_worker_is_known(small_shards: Path, server: DecodeServer) -> None:
    with SplitReader(Manifest.load(small_shards), "train") as reader, loader_of(reader, server) as loader:
        assert isinstance(loader, ProcessLoader)
        assert loader.at_work() == ""
        loader._pool.at_work[1] = (0, 7, time.monotonic() - 5)
        assert loader.at_work() == f"decoding process 1 has been at {reader.describe(7)} for 5 s"


def test_threads_are_still_available(small_shards: Path) -> None:
    with SplitReader(Manifest.load(small_shards), "train") as reader, loader_of(reader, None) as loader:
        assert isinstance(loader, Loader)
