"""Checkpoints of a state on a GPU: they hold the bytes of their step, and the loop does not wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from gpu_waits import ON_A_GPU, no_wait_for_the_gpu
from kept import LINEAGE
from test_state_copy import change, states

from wasteddp.model import networks
from wasteddp.training.checkpoint import reader as checkpoints
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.checkpoint.state import Gpu, StateCopy
from wasteddp.training.checkpoint.writer import CheckpointWriter

pytestmark = ON_A_GPU

State = dict[str, torch.Tensor]
BUSY_CYCLES = 1_000_000_000  # about half a second


class Full(Gpu):
    """A GPU without memory for a second state."""

    def memory(self) -> tuple[int, int]:
        return 0, super().memory()[1]


def on_gpu(value: int) -> dict[str, State]:
    """Return the state of test_state_copy on the GPU, except for the optimizer's step."""
    return {
        name: {key: tensor if key == "step" else tensor.detach().cuda() for key, tensor in state.items()}
        for name, state in states(value).items()
    }


@pytest.mark.parametrize("gpu", [Gpu, Full])
def test_the_saved_bytes_are_those_of_the_step_although_training_goes_on(tmp_path: Path, gpu: type[Gpu]) -> None:
    files, said = [], list[str]()
    for name, make in (("gpu", on_gpu), ("cpu", states)):
        (tmp_path / name).mkdir()
        writer = CheckpointWriter(tmp_path / name, keep_last=3)
        writer._copy = StateCopy(said.append, gpu())
        for step in (1, 2, 3):
            given = make(step)
            if name == "gpu":
                torch.cuda._sleep(BUSY_CYCLES)  # delays the kernels that are launched next
            writer.save(Progress(LINEAGE, step=step), given, "a: 1\n")
            change(given)
        writer.close()
        files.append({file.relative_to(tmp_path / name): file.read_bytes() for file in tmp_path.glob(f"{name}/*/*")})
        read = checkpoints.read(tmp_path / name / "step-00000002").states
        assert all(torch.equal(read[kind][key], t) for kind, state in states(2).items() for key, t in state.items())
    assert len(files[0]) == 3 * 5
    assert files[0] == files[1]
    assert len(said) == (gpu is Full)


def test_the_loop_does_not_wait_for_the_gpu(measured: Callable[[str], None]) -> None:
    model = networks.build("resnet50", 6).cuda().to(memory_format=torch.channels_last)
    momenta = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    copy, waits = StateCopy(pytest.fail), []
    for number in range(8):
        given = {"model": model.state_dict(), "optimizer": momenta}
        torch.cuda.synchronize()
        began = time.perf_counter()
        if number == 0:  # the first save allocates memory
            fetch = copy.begin(given)
            waits.append(1000 * (time.perf_counter() - began))
        else:
            torch.cuda._sleep(BUSY_CYCLES)
            idle = torch.cuda.current_stream().record_event()
            began = time.perf_counter()
            with no_wait_for_the_gpu():
                fetch = copy.begin(given)
            waits.append(1000 * (time.perf_counter() - began))
            assert not idle.query(), "the loop has waited for the GPU"
        expected = {name: tensor.clone() for name, tensor in given["model"].items()}
        change(given)
        fetched = fetch()
        assert all(torch.equal(fetched["model"][name], tensor.cpu()) for name, tensor in expected.items())
        with torch.no_grad():
            for tensor in [*model.parameters(), *momenta.values()]:
                tensor += number + 1
    num_mb = sum(tensor.nbytes for state in given.values() for tensor in state.values()) / 1e6
    measured(
        f"copy of a ResNet50's state, {num_mb:.0f} MB: the loop is held for {median(waits[1:]):.2f} ms, median of "
        f"{len(waits) - 1} (the first time {waits[0]:.2f} ms)"
    )


def test_page_locked_memory_is_allocated_once(measured: Callable[[str], None]) -> None:
    copy, pointers, took = StateCopy(pytest.fail), [], []
    given = {"model": {"w": torch.ones(47_000_000, device="cuda")}}
    for _ in range(4):
        fetch = copy.begin(given)
        began = time.perf_counter()
        weights = fetch()["model"]["w"]
        took.append(1000 * (time.perf_counter() - began))
        assert weights.is_pinned()
        pointers.append(weights.data_ptr())
    assert len(set(pointers)) == 1
    measured(f"188 MB to page-locked memory, in the thread that writes: first {took[0]:.0f} ms, then {took[-1]:.1f}")
