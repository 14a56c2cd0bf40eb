"""A profile reports what bounds the steps: each moment counts once, and the slowest rank decides."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainings import config_of

from wasteddp import train
from wasteddp.data.reader import SplitReader
from wasteddp.training.tracking.profiler import KINDS, exclusive_shares, shares_of, verdict

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)).map(lambda p: (float(p[0]), float(p[0] + p[1]))))


@given(st.fixed_dictionaries({"steps": spans, "device": spans, "communication": spans, "data": spans}))
def test_each_moment_of_the_steps_is_counted_once_and_by_what_comes_first(
    found: dict[str, list[tuple[float, float]]],
) -> None:
    counted = dict.fromkeys(KINDS, 0)
    for moment in range(80):
        inside = {kind for kind, parts in found.items() if any(b <= moment < e for b, e in parts)}
        if "steps" in inside:
            counted[next((kind for kind in KINDS if kind in inside), "Python")] += 1
    total = sum(counted.values())
    expected = {kind: count / total for kind, count in counted.items()} if total else {**counted, "Python": 1}
    assert exclusive_shares({**found, "Python": []}) == pytest.approx(expected)


def test_communication_and_reading_during_computing_cost_nothing() -> None:
    shares = exclusive_shares(
        {"steps": [(0, 100)], "device": [(10, 90)], "communication": [(50, 95)], "data": [(0, 20)], "Python": []}
    )
    assert shares == {"device": 0.8, "communication": 0.05, "data": 0.1, "Python": pytest.approx(0.05)}


def shares(device: float, communication: float, data: float, starved: float = 0.0) -> dict[str, float]:
    rest = 1 - device - communication - data
    return {"device": device, "communication": communication, "data": data, "Python": rest, "starved": starved}


@pytest.mark.parametrize(
    ("by_rank", "bound"),
    [
        ([shares(0.9, 0.02, 0.03)], "device"),
        ([shares(0.2, 0.02, 0.7)], "data"),
        ([shares(0.3, 0.02, 0.08)], "Python"),
        ([shares(0.3, 0.02, 0.08, starved=0.2)], "Python"),
        ([shares(0.3, 0.02, 0.08, starved=0.4)], "starvation"),
        ([shares(0.6, 0.0, 0.1, starved=0.3)], "device"),
        ([shares(0.3, 0.6, 0.05), shares(0.32, 0.61, 0.05)], "communication"),
        # rank 0 waits for rank 1, and rank 1 for its loader: the loader bounds both
        ([shares(0.2, 0.75, 0.01), shares(0.2, 0.05, 0.7)], "data"),
    ],
)
def test_the_rank_that_waits_least_for_others_is_judged(by_rank: list[dict[str, float]], bound: str) -> None:
    text = verdict(by_rank, step_ms=123.4, steps=10)
    assert text.startswith(f"bound by {bound}: ")
    assert "of 10 steps of 123 ms" in text
    assert text.count("  rank ") == len(by_rank)
    assert "  do: " in text


def test_what_a_starved_loop_needs_is_not_larger_micro_batches() -> None:
    starved, busy = (verdict([shares(0.2, 0, 0, starved=part)], step_ms=9, steps=1) for part in (0.7, 0.1))
    assert "data.workers" in starved
    assert "train.max_micro_batch" not in starved
    assert "train.max_micro_batch" in busy


def event(name: str, begin: int, end: int, *, on: str = "CPU") -> SimpleNamespace:
    return SimpleNamespace(
        name=name, device_type=SimpleNamespace(name=on), time_range=SimpleNamespace(start=begin, end=end)
    )


@pytest.mark.parametrize(
    ("cpu_us", "starved"),
    [
        (55, 0.0),  # small kernels: the thread was busy whenever the device was not
        (30, 0.0),  # the time in which the device was idle and no backward pass was launched
        (10, 0.2),
        (0, 0.3),
    ],
)
def test_on_a_gpu_the_thread_that_launches_the_backward_pass_is_not_starvation(cpu_us: int, starved: float) -> None:
    events = [
        event("wasteddp: step", 0, 100),
        event("wasteddp: step", 0, 100, on="CUDA"),
        event("wasteddp: waiting for data", 0, 5),
        event("aten::conv2d", 5, 40),  # the host's part of a launch
        event("kernel", 10, 45, on="CUDA"),
        event("autograd::engine::evaluate_function: ConvolutionBackward0", 40, 80),
        event("kernel", 60, 70, on="CUDA"),
    ]
    found, seconds = shares_of(events, cpu_us / 1e6)
    assert seconds == 100 / 1e6
    assert found == pytest.approx({**shares(0.45, 0.0, 0.05), "starved": starved - 0.05 * (starved > 0)})


def profiled(folder: Path, shards: Path, *more: str) -> tuple[str, Path]:
    """Return the verdict of a short run, and its folder."""
    overrides = ["profile.steps=2", "profile.skip=1", "train.epochs=1", *more]
    arguments = config_of(folder, shards) + [part for one in overrides for part in ("--set", one)]
    assert train.main(arguments) == 0
    return (folder / "run" / "profile" / "verdict.txt").read_text(), folder / "run"


@pytest.mark.usefixtures("reports")
def test_a_slow_loader_is_found_out_and_the_trace_is_left(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SplitReader.read

    def slowly(self: SplitReader, sample: int) -> bytes:
        time.sleep(0.05)  # 12 images by one thread: 0.6 s a step, beside a tenth of computing on a busy machine
        return read(self, sample)

    monkeypatch.setattr(SplitReader, "read", slowly)
    text, run = profiled(tmp_path, small_shards, "data.workers=1")
    assert text.startswith("bound by data: ")
    assert "data.workers" in text
    with gzip.open(run / "profile" / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"wasteddp: step", "wasteddp: waiting for data", "aten::convolution"} <= names
    assert text.splitlines()[0] in (run / "log.txt").read_text()
    assert "bound by data" in (run / "report.html").read_text()


def test_a_run_that_ends_before_reports_it(small_shards: Path, tmp_path: Path) -> None:
    arguments = [*config_of(tmp_path, small_shards), "--set", "train.epochs=1", "--set", "profile.steps=50"]
    assert train.main(arguments) == 0
    assert not (tmp_path / "run" / "profile").exists()
    assert "no profile: this start ended after 4 steps" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.usefixtures("full_width")  # last: it is full for the rest of the module
def test_a_run_that_computes_is_bound_by_its_device(small_shards: Path, tmp_path: Path) -> None:
    text, _ = profiled(tmp_path, small_shards, "data.image_size=96")
    assert text.startswith("bound by device: ")
