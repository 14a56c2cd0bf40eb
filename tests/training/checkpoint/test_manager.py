"""Saves of a run: when they happen, and that the state is restored exactly with each optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.state import AcceleratorState
from kept import LINEAGE, steps_in
from torch import nn

from wasteddp import settings
from wasteddp.errors import CheckpointError, StorageError
from wasteddp.training.checkpoint.manager import CheckpointManager, Stateful
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.checkpoint.writer import CheckpointWriter
from wasteddp.training.dataloaders import Inputs
from wasteddp.training.distributed import startup
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.tracking.journal import is_known

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield startup.start_runtime(parsed(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)


def parsed(folder: Path, text: str = "") -> settings.Settings:
    return settings.parse(f"precision: fp32\nrun: {{out: {folder / 'run'}, threads: 1}}\n{text}")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert isinstance(model, nn.Module)
    return model


def manager_of(
    folder: Path,
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    text: str = "",
    further: dict[str, Stateful] | None = None,
    clock: Callable[[], float] = lambda: 0.0,
) -> CheckpointManager:
    optimizer = optimizer or OPTIMIZERS["sgd"](model.parameters())
    data = cast(Inputs, None)  # used only for a best model
    return CheckpointManager(parsed(folder, text), runtime, data, model, optimizer, further=further, clock=clock)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(images), torch.arange(6) % 2).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("saved_compiled", "loaded_compiled"),
    [(False, False), (True, True), (True, False), (False, True)],
    ids=["", "compiled", "compiled then not", "compiled only then"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_after_a_restore_are_those_of_a_run_without_one(
    name: str, saved_compiled: bool, loaded_compiled: bool, tmp_path: Path, runtime: Runtime
) -> None:
    def start(*, compiled: bool) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        model = network()
        used: nn.Module = torch.compile(model, backend="eager") if compiled else model  # type: ignore[assignment]
        return model, used, OPTIMIZERS[name](used.parameters())

    undisturbed, used, optimizer = start(compiled=loaded_compiled)
    take_steps(used, optimizer, 0, 6)

    _, used, optimizer = start(compiled=saved_compiled)
    take_steps(used, optimizer, 0, 3)
    with manager_of(tmp_path, runtime, used, optimizer) as manager:
        manager.save(Progress(LINEAGE, step=3), epoch=0, best=None)
        manager.close()
    model, used, optimizer = start(compiled=loaded_compiled)
    take_steps(used, optimizer, 7, 8)  # a different state, which the checkpoint replaces
    with manager_of(tmp_path, runtime, used, optimizer) as manager:
        found = manager.starting_point("auto", [], lineage=LINEAGE)
        assert found is not None
        assert all(key.startswith(("0.", "1.", "4.")) for key in found.states["model"])
        manager.state.restore(found)
    for parameter in model.parameters():
        for tensor in optimizer.state[parameter].values():
            assert tensor.ndim != 4 or tensor.stride() == parameter.stride(), "channels-last stays so"
    take_steps(used, optimizer, 3, 6)
    for key, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_a_save_is_due_by_the_clock(tmp_path: Path, runtime: Runtime) -> None:
    now = 0.0
    with manager_of(tmp_path, runtime, network(), text="checkpoint: {every_minutes: 2}", clock=lambda: now) as manager:
        assert not manager.asks()
        now = 119.0
        assert not manager.asks()
        now = 120.0
        assert manager.asks()
        manager.save(Progress(LINEAGE, step=1), epoch=0, best=None)
        manager.close()
        assert not manager.asks()
        now = 240.0
        assert manager.asks()


def test_a_save_is_made_on_request_and_the_request_goes_when_it_is_on_the_disk(
    tmp_path: Path, runtime: Runtime
) -> None:
    with manager_of(tmp_path, runtime, network()) as manager:
        assert not manager.asks()
        (tmp_path / "run" / "SAVE_NOW").touch()
        assert manager.asks()
        manager.save(Progress(LINEAGE, step=1), epoch=0, best=None)
        manager.close()
        assert not (tmp_path / "run" / "SAVE_NOW").exists()
        assert not manager.asks()
        assert steps_in(tmp_path / "run" / "checkpoints") == [1]


def test_further_states_come_back_or_are_missed(tmp_path: Path, runtime: Runtime) -> None:
    average = nn.Linear(2, 2)
    with manager_of(tmp_path, runtime, network(), further={"ema": average}) as manager:
        manager.save(Progress(LINEAGE, step=1), epoch=0, best=None)
        manager.close()
    other = nn.Linear(2, 2)
    with manager_of(tmp_path, runtime, network(), further={"ema": other}) as manager:
        found = manager.starting_point("auto", [], lineage=LINEAGE)
        assert found is not None
        manager.state.restore(found)
        assert torch.equal(other.weight, average.weight)
    with (
        manager_of(tmp_path, runtime, network(), further={"twin": other}) as manager,
        pytest.raises(CheckpointError, match="has no state of: twin"),
    ):
        manager.state.restore(found)


def test_the_seconds_of_the_last_whole_checkpoint_are_a_metric(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CheckpointWriter._write

    def slow(self: CheckpointWriter, *arguments: Any) -> None:
        time.sleep(0.2)
        real(self, *arguments)

    def no_room(*_: Any) -> None:
        raise StorageError("no room", "", "")

    monkeypatch.setattr(CheckpointWriter, "_write", slow)
    with manager_of(tmp_path, runtime, network()) as manager:
        assert manager.metrics == {"checkpoint/stall_ms": 0, "checkpoint/failed": 0}, "there has been none"
        manager.save(Progress(LINEAGE, step=1), epoch=0, best=None)
        assert "checkpoint/seconds" not in manager.metrics, "it is being written"
        manager.wait()
        seconds = manager.metrics["checkpoint/seconds"]
        assert 0.2 <= seconds < 10
        monkeypatch.setattr(CheckpointWriter, "_write", no_room)
        manager.save(Progress(LINEAGE, step=2), epoch=0, best=None)
        manager.save(Progress(LINEAGE, step=3), epoch=0, best=None)  # reports the previous failure
        assert manager.metrics["checkpoint/failed"] == 1
        assert manager.metrics["checkpoint/seconds"] == seconds
        assert manager.metrics["checkpoint/stall_ms"] > 0
        monkeypatch.setattr(CheckpointWriter, "_write", real)
        manager.close()  # retries
        assert manager.metrics["checkpoint/seconds"] < 0.2
    assert all(is_known(name) for name in manager.metrics)


def test_two_writers_of_one_run_are_refused(tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wasteddp.training.checkpoint.manager.LOCK_WAIT_S", 0.2)
    with manager_of(tmp_path, runtime, network()), pytest.raises(CheckpointError, match="is being written by process"):
        manager_of(tmp_path, runtime, network())
    with manager_of(tmp_path, runtime, network()):
        pass
