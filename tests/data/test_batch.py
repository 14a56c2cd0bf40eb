"""Copies to the device: the same batches in the same order, one ahead on a GPU, and no copy on a CPU."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trainings import config_of, rows

from wasteddp import train
from wasteddp.data import batch as module
from wasteddp.data.batch import Batch, copied_ahead, one_ahead
from wasteddp.data.decoding.crop import TrainingView
from wasteddp.data.loader import Loader
from wasteddp.errors import DamagedSampleError
from wasteddp.training import dataloaders


class Event(str):
    """A fake event, which is done when `is_passed` is set."""

    is_passed = True

    def query(self) -> bool:
        return self.is_passed


def batches(count: int) -> list[Batch]:
    made = []
    for number in range(count):
        samples = np.arange(4 * number, 4 * number + 4)
        images = torch.full((4, 3, 8, 8), number, dtype=torch.uint8)
        made.append(Batch(0, number, images, torch.full((4,), number), samples, samples, ()))
    return made


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_cpu_gets_the_batches_themselves(count: int) -> None:
    made = batches(count)
    passed = list(copied_ahead(iter(made), torch.device("cpu")))
    assert len(passed) == count
    assert all(one is other for one, other in zip(passed, made, strict=True))


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("fails", [False, True])
def test_a_failure_comes_in_its_own_place_after_all_that_was_begun(count: int, fails: bool) -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        yield from range(count)
        if fails:
            raise OSError("no more")

    taken = []
    with pytest.raises(OSError, match="no more") if fails else contextlib.nullcontext():
        for item in one_ahead(items(), lambda item: begun.append(item) or item):  # type: ignore[func-returns-value]
            taken.append(item)
            assert begun == list(range(min(item + 2, count))), "one is begun ahead, and no more"
    assert taken == list(range(count))


def test_an_item_that_cannot_be_begun_comes_after_those_that_were() -> None:
    ahead = one_ahead(iter([4, 2, 0]), lambda item: 8 // item)
    assert [next(ahead), next(ahead)] == [2, 4]
    with pytest.raises(ZeroDivisionError):
        next(ahead)


def test_what_the_device_decodes_is_begun_by_a_thread_and_given_out_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: dict[int, str] = {}

    def copied(batch: SimpleNamespace, *_: object) -> tuple[SimpleNamespace, Event]:
        threads[batch.number] = threading.current_thread().name
        if batch.number == 3:
            raise ValueError("nvJPEG")
        return batch, Event(f"event {batch.number}")

    waited: list[str] = []
    stream = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(module, "_copied", copied)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    tensor = SimpleNamespace(record_stream=lambda stream: None)
    made = [
        SimpleNamespace(number=i, encoded_B=(None, object())[: 2 * (i % 2)], images_BCHW=tensor, labels_B=tensor)
        for i in range(5)
    ]
    seen: list[Any] = []
    with pytest.raises(ValueError, match="nvJPEG"):
        seen.extend(copied_ahead(iter(made), torch.device("cuda")))  # type: ignore[arg-type]
    assert seen == made[:3]
    assert waited == ["event 0", "event 1", "event 2"]
    here = threading.current_thread().name
    assert [threads[i] == here for i in range(4)] == [True, False, True, False]


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_batch_that_was_copied_already_is_trained_on_when_the_next_cannot_be_read(
    looks_ahead: bool,
    small_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Loader.batches

    def third_fails(self: Loader, steps: Any) -> Iterator[Batch]:
        for number, batch in enumerate(real(self, steps)):
            if number == 2 and isinstance(self._view, TrainingView):
                raise DamagedSampleError("train-000000.tar is full of holes", "", "copy it again")
            yield batch

    monkeypatch.setattr(Loader, "batches", third_fails)
    if looks_ahead:  # simulates a GPU
        monkeypatch.setattr(
            dataloaders, "copied_ahead", lambda batches, device: one_ahead(batches, lambda batch: batch)
        )
    assert train.main(config_of(tmp_path, small_shards)) == 2
    assert "train-000000.tar is full of holes" in capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))[-1] == "step-00000002"


class Tape:
    """Fake streams, which record the calls in order."""

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def record_event(self) -> Event:
        self._asked.append("event")
        return Event(self._asked[-2].replace("copy", "copied"))

    def wait_event(self, event: str) -> None:
        self._asked.append(f"wait until {event}")


class Tensor:
    """Fake images or labels with the number of their batch."""

    def __init__(self, asked: list[str], number: int) -> None:
        self._asked, self._number = asked, number

    def to(self, device: torch.device, *, non_blocking: bool) -> Tensor:
        assert non_blocking
        self._asked.append(f"copy {self._number}")
        return self

    def record_stream(self, stream: Tape) -> None:
        self._asked.append(f"in use {self._number}")


def test_the_network_waits_for_the_copy_of_its_own_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Tape(asked))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Tape(asked))
    made: list[Any] = [
        replace(batch, images_BCHW=Tensor(asked, number), labels_B=Tensor(asked, number))  # type: ignore[arg-type]
        for number, batch in enumerate(batches(3))
    ]
    for batch in copied_ahead(iter(made), torch.device("cuda")):
        asked.append(f"train {batch.step_in_epoch}")
    copies = [["copy 0"] * 2 + ["event"], ["copy 1"] * 2 + ["event"], ["copy 2"] * 2 + ["event"], []]
    expected = copies[0]
    for number in range(3):
        expected += copies[number + 1]
        expected += [f"wait until copied {number}", *[f"in use {number}"] * 2, f"train {number}"]
    assert asked == expected


@pytest.mark.parametrize("is_passed", [True, False])
def test_a_batch_of_the_loader_is_kept_until_its_copy_is_done(monkeypatch: pytest.MonkeyPatch, is_passed: bool) -> None:
    """A tensor whose memory is overwritten when it is freed."""
    monkeypatch.setattr(Event, "is_passed", is_passed)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Tape([""]))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Tape([]))
    alive: list[weakref.ref[Tensor]] = []

    class Source(Tensor):
        def to(self, device: torch.device, *, non_blocking: bool) -> Tensor:
            return Tensor([], self._number)

    def sources() -> Iterator[Batch]:
        for number, batch in enumerate(batches(6)):
            images = Source([], number)
            alive.append(weakref.ref(images))
            yield replace(batch, images_BCHW=images, labels_B=Tensor([], number))  # type: ignore[arg-type]
            del images

    for number, _ in enumerate(copied_ahead(sources(), torch.device("cuda"))):
        if number == 3:  # the copy of number 4 is running
            kept = [reference() is not None for reference in alive]
    assert kept[-1]
    assert kept[:3] == [not is_passed] * 3
