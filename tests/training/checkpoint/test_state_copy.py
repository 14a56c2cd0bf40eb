"""Copies of a state through a device: their content, which thread waits, and what happens without enough memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kept import LINEAGE

from wasteddp.errors import StorageError
from wasteddp.training.checkpoint import reader as checkpoints
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.checkpoint.reader import States
from wasteddp.training.checkpoint.state import Gpu, StateCopy
from wasteddp.training.checkpoint.writer import CheckpointWriter

MB = 1_000_000


class Device(Gpu):
    """A fake device in host memory. It holds all tensors except float64, and records the calls."""

    def __init__(self, free_mb: int = 1000, total_mb: int = 1000) -> None:
        super().__init__()
        self.free_mb, self.total_mb = free_mb, total_mb
        self.done: list[str] = []
        self.marks = 0
        self.exhausted = False

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.dtype != torch.float64

    def memory(self) -> tuple[int, int]:
        return self.free_mb * MB, self.total_mb * MB

    def allocate(self, num_bytes: int) -> torch.Tensor:
        if self.exhausted:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 MiB.\nmore")
        self.done.append("device")
        return torch.full((num_bytes,), 7, dtype=torch.uint8)

    def allocate_on_host(self, num_bytes: int) -> torch.Tensor:
        self.done.append("host")
        return torch.full((num_bytes,), 9, dtype=torch.uint8)

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def fetch(self, source: torch.Tensor, target: torch.Tensor, launched: int) -> None:
        assert launched == self.marks, "of the newest copy"
        self.done.append("fetch")
        target.copy_(source)


def states(value: int, *, further: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Sizes that are not multiples of 256 bytes, several types and memory formats, and one tensor on the host."""
    weight = torch.arange(2 * 3 * 5 * 5, dtype=torch.float32).view(2, 3, 5, 5) + value
    return {
        "model": {
            "conv.weight": weight.to(memory_format=torch.channels_last),
            "num_batches": torch.tensor(value),
            "none": torch.zeros(0),
            "half": torch.full((3,), value, dtype=torch.bfloat16),
            "mask": torch.tensor([True, False]),
        },
        "optimizer": {
            "step": torch.tensor(float(value), dtype=torch.float64),
            "momentum": torch.full((7 + further,), 0.5 + value).requires_grad_(),
            "turned": torch.full((4, 3), value).t(),
        },
    }


def change(states: States) -> None:
    """Update the states in place, as training does."""
    with torch.no_grad():
        for state in states.values():
            for tensor in state.values():
                tensor.zero_()


def assert_equal(found: States, expected: States) -> None:
    assert list(found) == list(expected)
    for name, state in expected.items():
        assert list(found[name]) == list(state)
        for key, tensor in state.items():
            assert found[name][key].dtype == tensor.dtype
            assert torch.equal(found[name][key], tensor), key


def test_the_copies_are_of_the_step_of_the_save_although_training_goes_on() -> None:
    device = Device()
    copy = StateCopy(print, device)
    for value in (1, 2, 3):  # into new memory first, then into the same memory
        given = states(value)
        fetch = copy.begin(given)
        change(given)
        assert_equal(fetch(), states(value))
        assert_equal(fetch(), states(value))  # again, as after a failed save
    assert device.done == ["device", *["host", "fetch", "fetch"], *["fetch"] * 4]


def test_the_loop_launches_and_leaves_the_host_to_the_writer() -> None:
    device = Device()
    StateCopy(print, device).begin(states(1))
    assert device.marks == 1
    assert device.done == ["device"], "page-locking and the copy to the host are not the loop's"


def test_the_copies_lie_in_memory_as_the_tensors_do() -> None:
    copies = StateCopy(print, Device()).begin(states(1))()
    for name, state in states(1).items():
        for key, tensor in state.items():
            assert copies[name][key].stride() == tensor.stride(), key


def test_a_state_that_has_changed_its_shape_gets_other_memory_only_if_it_is_larger() -> None:
    device = Device()
    copy = StateCopy(print, device)
    for further in (0, 3, 1000, 2):
        assert_equal(copy.begin(states(1, further=further))(), states(1, further=further))
    assert device.done == ["device", "host", "fetch", "fetch", "device", "host", "fetch", "fetch"]
    del (less := states(2))["optimizer"]["momentum"]
    assert_equal(copy.begin(less)(), less)  # a removed tensor is not saved


@pytest.mark.parametrize("free_mb", [0, 50])
def test_where_memory_is_lacking_the_loop_waits_and_that_is_reported_once(free_mb: int) -> None:
    device, said = Device(free_mb), list[str]()
    copy = StateCopy(said.append, device)
    for value in (1, 2):
        given = states(value)
        fetch = copy.begin(given)
        assert_equal(fetch(), states(value))
        change(given)
        assert_equal(fetch(), states(value))
    assert device.done == []
    assert said == [
        f"training waits for the copy of each checkpoint to the host: the GPU has {free_mb} MB free, "
        "and a second state takes 0 MB"
    ]
    device.free_mb = 51  # 5 % of 1000 MB must stay free
    assert_equal(copy.begin(states(3))(), states(3))
    assert device.done == ["device", "host", "fetch"]


def test_memory_that_is_free_and_cannot_be_had_is_memory_that_is_lacking() -> None:
    device, said = Device(), list[str]()
    device.exhausted = True
    assert_equal(StateCopy(said.append, device).begin(states(1))(), states(1))
    assert said[0].endswith(": CUDA out of memory. Tried to allocate 7 MiB.")


def test_a_state_on_the_host_asks_nothing_of_a_gpu() -> None:
    device = Device(free_mb=0)
    given = {"model": {"w": torch.zeros(3, dtype=torch.float64)}}
    assert_equal(StateCopy(pytest.fail, device).begin(given)(), given)
    assert_equal(StateCopy(pytest.fail).begin(states(1))(), states(1))


def test_a_checkpoint_by_way_of_the_device_has_the_bytes_of_one_without(tmp_path: Path) -> None:
    files = []
    for name, gpu in (("by way", Device()), ("without", Gpu())):
        (tmp_path / name).mkdir()
        writer = CheckpointWriter(tmp_path / name, keep_last=2)
        writer._copy = StateCopy(print, gpu)
        for step in (1, 2):
            given = states(step)
            writer.save(Progress(LINEAGE, step=step), given, "a: 1\n")
            change(given)
        writer.close()
        files.append({file.relative_to(tmp_path / name): file.read_bytes() for file in tmp_path.glob(f"{name}/*/*")})
        assert checkpoints.read(tmp_path / name / "step-00000001").states["model"]["num_batches"] == 1
    assert len(files[0]) == 2 * 5
    assert files[0] == files[1]


def test_a_save_that_failed_is_tried_again_with_the_state_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path / "checkpoints", keep_last=1)
    writer._copy = StateCopy(print, Device())
    (tmp_path / "checkpoints").write_text("in the way")
    given = states(5)
    writer.save(Progress(LINEAGE, step=1), given, "")
    with pytest.raises(StorageError):
        writer.wait()
    change(given)
    (tmp_path / "checkpoints").unlink()
    writer.again()
    writer.close()
    found = checkpoints.read(tmp_path / "checkpoints" / "step-00000001").states
    assert found["model"]["num_batches"] == 5


def test_an_error_of_the_copy_reaches_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer._copy = StateCopy(print, device)
    monkeypatch.setattr(device, "allocate_on_host", lambda num_bytes: 1 / 0)
    writer.save(Progress(LINEAGE, step=1), states(1), "")
    with pytest.raises(ZeroDivisionError):
        writer.close()
    assert list(tmp_path.iterdir()) == []
