"""Marks and the messages between ranks, with a store in memory instead of the launcher's."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]
from trainings import config_of

from wasteddp import train
from wasteddp.data.loader import Loader
from wasteddp.errors import EXIT_FAILED, EXIT_USER_ERROR, ShardError
from wasteddp.training.watchdog import watchdog
from wasteddp.training.watchdog.failures import Beat, Failure, HeartbeatStore, LostStoreError
from wasteddp.training.watchdog.watchdog import Watchdog


def test_the_first_failure_stands() -> None:
    store = HashStore()
    ours, theirs = HeartbeatStore(store, 2), HeartbeatStore(store, 2)
    assert ours.failure() is None
    first, second = Failure(1, "a disk", 2), Failure(0, "a consequence", 70)
    assert theirs.claim(first) == first
    assert ours.claim(second) == first
    assert ours.failure() == first


def test_beats_are_read_back_and_missing_ones_do_not_wait() -> None:
    store = HeartbeatStore(HashStore(), 3)
    beat = Beat(1, 2, 3, "computing", 0.5, "decode_0", left=True)
    store.post(1, beat)
    assert store.beats() == [None, beat, None]


def test_a_store_without_a_server_is_lost() -> None:
    with pytest.raises(LostStoreError):
        HeartbeatStore.of_launcher("127.0.0.1", 1, 2, patience_s=0.1)


def test_the_process_of_the_store_ends_after_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, store = Watchdog(0, 3), HeartbeatStore(HashStore(), 3)
    watch._store, left = store, []

    def leave() -> None:
        for rank in (2, 1):
            left.append(rank)
            store.post(rank, Beat(9, 9, 9, "", 0.0, left=True))

    threading.Timer(0.1, leave).start()
    monkeypatch.setattr(watchdog, "_LEAVING_S", 60.0)
    watch._wait_until_the_others_left()
    assert left == [2, 1]
    monkeypatch.setattr(watchdog, "_LEAVING_S", 0.05)
    store.post(1, Beat(9, 9, 9, "", 0.0))
    watch._wait_until_the_others_left()  # a rank that was killed is not waited for longer


def test_marks_are_the_same_whatever_the_rank_and_slow_at_first() -> None:
    def marks(watch: Watchdog) -> list[tuple[int, str, bool]]:
        seen = []
        for _ in watch.steps(iter("abc"), first_step=4):
            before = watch.enter_collective()
            watch.leave_collective(before)
            seen.append((watch._mark.number, watch._mark.place, watch._mark.slow))
        for _ in watch.over(iter("de"), "evaluating"):
            seen.append((watch._mark.number, watch._mark.place, watch._mark.slow))
        return seen

    first, second = Watchdog(0, 2), Watchdog(1, 2)
    assert marks(first) == marks(second)
    places = marks(Watchdog())
    assert [slow for _, _, slow in places] == [True, False, False, True, False]
    assert [place for _, place, _ in places] == ["computing"] * 3 + ["evaluating"] * 2
    assert first._step == 8  # it waits for the batch of step 8, after 5, 6 and 7


def test_a_failure_is_reported_once_and_errors_of_the_user_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watchdog()
    assert watch.failed(ShardError("no tar", "nothing to read", "copy it")) == EXIT_USER_ERROR
    assert watch.failed(ValueError("while closing")) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert said.startswith("error: no tar\n  so: nothing to read\n  do: copy it")


def test_a_bug_ends_with_70_and_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), Watchdog() as watch:
        1 / 0  # noqa: B018
    assert watch.failed(ZeroDivisionError()) == EXIT_FAILED
    said = capsys.readouterr().err
    assert "error: the training: ZeroDivisionError: division by zero" in said
    assert "in test_a_bug_ends_with_70" in said


def test_only_rank_0_reports_without_a_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert Watchdog(1, 2).failed(ShardError("no tar")) == EXIT_USER_ERROR
    assert capsys.readouterr().err == ""


def test_a_loader_s_thread_that_dies_is_named_with_its_sample(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Loader._read_row

    def failing(self: Loader, out: Any, sample: int, *rest: Any) -> int:
        if sample == 3:
            raise MemoryError("no room")
        return real(self, out, sample, *rest)

    monkeypatch.setattr(Loader, "_read_row", failing)
    assert train.main(config_of(tmp_path, small_shards)) == EXIT_FAILED
    said = capsys.readouterr().err
    assert "error: the training: MemoryError: no room\n  in the loader's thread " in said
    assert "train-000000.tar, sample 3 at byte" in said
    assert "MemoryError: no room" in (tmp_path / "run" / "log.txt").read_text()


def test_out_of_gpu_memory_names_the_setting_with_its_number(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.1 GiB")

    monkeypatch.setattr("torchvision.models.resnet.ResNet.forward", full)
    assert train.main(config_of(tmp_path, small_shards)) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert "out of GPU memory while computing with train.max_micro_batch 6 at 32 px: CUDA out of memory. Tried" in said
    assert "set train.max_micro_batch to 3 or less (the global batch stays the same" in said
    assert "Traceback" not in said
