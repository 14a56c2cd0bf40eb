"""The sides of the benchmarks take steps, and their tables show the measurements."""

from __future__ import annotations

import re
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import bench
from launch.benchmarks import export as bench_export
from launch.benchmarks import predict as bench_predict
from launch.benchmarks import scaling as bench_scaling
from launch.benchmarks import serve as bench_serve
from launch.benchmarks import step as bench_step
from launch.benchmarks import train as bench_train
from launch.benchmarks.datasets import drawn_set, unpack
from launch.benchmarks.machine import headline
from launch.benchmarks.scaling import Found
from wasteddp import settings as settings_file
from wasteddp.data.manifest import Manifest
from wasteddp.settings import Settings
from wasteddp.training.tracking import profiler


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with a step of one micro-batch of 6 instead of 4 of them."""
    text = "precision: fp32\nrun: {threads: 1}\ndata: {image_size: 32}\nmodel: {arch: resnet18}"
    asked = settings_file.parse(text, ["train.batch_size=24", "train.max_micro_batch=6", "data.workers=1"])
    return bench_step.one_micro_batch(asked, tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("side", bench_step.SIDES)
def test_each_side_trains(side: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    if side == bench_step.TIMM and not find_spec("timm"):
        pytest.skip("timm is not installed")
    made: list[torch.optim.Optimizer] = []
    init = torch.optim.Optimizer.__init__

    def noted(self: torch.optim.Optimizer, *rest: object, **how: object) -> None:
        made.append(self)
        init(self, *rest, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", noted)
    with ExitStack() as stack:
        step = bench_step.SIDES[side](settings, stack)
        weight = max((p for group in made[0].param_groups for p in group["params"]), key=torch.numel)
        before = weight.detach().clone()
        step()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("side", bench_train.OTHERS)
def test_each_of_the_others_trains_from_a_folder(side: str, settings: Settings, tmp_path: Path) -> None:
    if side == bench_step.TIMM and not find_spec("timm"):
        pytest.skip("timm is not installed")
    shards = Path(settings.data.shards)
    unpack(shards, tmp_path, split="train")
    split = Manifest.load(shards).split("train")
    assert [len(list(tmp_path.glob(f"{name}/*"))) for name in sorted(path.name for path in tmp_path.iterdir())] == [
        count for _, count in sorted(zip(Manifest.load(shards).classes, split.samples_per_class, strict=True))
    ]
    with ExitStack() as stack:
        step = bench_train.OTHERS[side](settings, stack, tmp_path)
        for _ in range(split.num_samples // 6 + 1):  # over the end of an epoch
            step()


def test_each_benchmark_that_the_help_names_can_be_called() -> None:
    named = re.findall(r"python -m launch\.bench (\w+)", str(bench.__doc__))
    assert len(named) == 13
    for name in named:
        assert callable(bench.parser().parse_args([name, *(["RUN", "FOLDER"] if name == "unlike" else [])]).run)


def test_the_server_under_load_and_the_loop_are_summed_up() -> None:
    turns = [bench_serve.Turn(seconds, [0.1] * 98 + [0.9] * 2, num_bad=5) for seconds in (1.9, 1.0, 3.8)]
    text = bench_serve.summary("title", turns, [100.0, 100.0, 50.0], [800.0, 805.0, 806.0])
    assert text.startswith("title, 15 of them bad")
    assert text.endswith("| 100.0 | 50.0 | 0.50 | 0.50 to 0.95 | 100 ms | 900 ms | 800 to 806 MB |")


@pytest.mark.slow
def test_no_request_of_the_server_under_load_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "serve",
        "--arch",
        "mobilenet_v3_small",
        "--size",
        "32",
        "--requests",
        "60",
        "--turns",
        "2",
        "--clients",
        "4",
    ]
    arguments = bench.parser().parse_args(line)
    arguments.run(arguments)
    assert "60 requests, 4 of them bad; all answered as they should be" in capsys.readouterr().out


def test_a_set_without_the_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no train-"):
        unpack(tmp_path, tmp_path / "out", split="train")


def test_a_rate_is_that_of_the_timed_steps(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    steps: list[int] = []
    monkeypatch.setitem(bench_step.SIDES, "counting", lambda settings, stack: lambda: steps.append(1))
    assert bench_step.rate("counting", settings, steps=8, warm=3) == 6 * 8 / 4
    assert len(steps) == 11


def test_the_steps_table_compares_within_each_round() -> None:
    text = bench_step.table({"wasteddp": [100.0, 50.0, 90.0], "timm": [50.0, 50.0, 100.0]}, 10)
    assert "| wasteddp | 90.0 | 111.1 | 1.000 of it |" in text
    assert "| timm | 50.0 | 200.0 | 1.000 of it |" in text


def test_predict_is_measured_with_all_of_it_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    asked = bench.parser().parse_args(
        ["predict", "--arch", "resnet18", "--size", "32", "--images", "9", "--rounds", "2", "--device", "cpu"]
    )
    asked.run(asked)
    assert "resnet18, 32 px, 9 images" in capsys.readouterr().out
    plain, full = bench_predict.both_sides(("a", "b", "c"), "resnet18", 32, device="cpu")
    assert (plain[0].training, plain[1]) == (None, None)
    assert full[0].training is not None
    assert full[1] is not None


def test_the_ratio_of_predict_is_that_within_each_round() -> None:
    speeds = [((100.0, 10.0), (50.0, 10.0)), ((50.0, 10.0), (50.0, 9.0)), ((100.0, 10.0), (90.0, 8.0))]
    rounds = [(bench_predict.Speed(*plain), bench_predict.Speed(*full)) for plain, full in speeds]
    text = bench_predict.summary(rounds, "a net")
    assert "| images/s | 100.00 | 50.00 | 0.900 | 0.700 to 0.950 |" in text
    assert "| images per second of processor time | 10.00 | 9.00 | 0.900 | 0.850 to 0.950 |" in text


def test_the_scaling_table_has_efficiency_and_communication() -> None:
    found = {2: [Found(100.0, (0.0, 0.0))], 4: [Found(60.0, (0.05, 0.2))]}
    text = bench_scaling.table(found, {2: 10, 4: 10})
    assert "| 2 | 10 | 100.0 | 100.0 | 100.0% | 0.0% to 0.0% |" in text
    assert "| 4 | 10 | 60.0 | 166.7 | 83.3% | 5.0% to 20.0% |" in text


def test_communication_is_read_from_the_profilers_verdict() -> None:
    shares = [
        dict.fromkeys((*profiler.KINDS, "starved"), 0.0) | {"device": 1 - talk, "communication": talk}
        for talk in (0.25, 0.05)
    ]
    verdict = profiler.verdict(shares, step_ms=10.0, steps=4)
    assert bench_scaling.communication_of(verdict) == (0.05, 0.25)


def test_the_headline_names_hardware_and_versions() -> None:
    line, version = headline(), torch.__version__.partition("+")[0]
    for part in (
        "cores",
        f"torch {version}",
        "torchvision ",
        "accelerate ",
        "load ",
        "GPU",
    ):
        assert part in line


@pytest.mark.parametrize("num_images", [1, 30])
def test_a_drawn_set_has_the_images_asked_for(num_images: int, tmp_path: Path) -> None:
    manifest = Manifest.load(drawn_set(tmp_path, num_images=num_images, size_px=16))
    assert manifest.split("train").num_samples >= num_images
    assert all(manifest.split("train").samples_per_class)
    assert manifest.split("val").num_samples > 0


def test_exported_files_are_timed_in_turns_beside_pytorch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int]] = []
    clock = [0.0]

    def side(name: str, seconds: float):  # type: ignore[no-untyped-def]
        def run(images: np.ndarray) -> None:  # type: ignore[type-arg]
            calls.append((name, len(images)))
            clock[0] += seconds * (2 if len(calls) % 7 == 0 else 1)  # one call of seven is slow

        return run

    sides = {"PyTorch": side("PyTorch", 0.4), "ONNX": side("ONNX", 0.1)}
    monkeypatch.setattr(bench_export, "_sides", lambda *_: (sides, 8, "resnet18"))
    monkeypatch.setattr(bench_export.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench_export.time, "sleep", lambda _: None)
    arguments = bench.parser().parse_args(["export", "--batches", "1,4", "--rounds", "3", "--seconds", "2"])
    arguments.run(arguments)
    output = capsys.readouterr().out
    assert re.search(
        r"batch 1, 8 px[\s\S]*PyTorch +2.5 images/s +400.0 ms +1.00[\s\S]*ONNX +10.0 images/s +100.0 ms +4.00", output
    )
    assert re.search(r"batch 4, 8 px[\s\S]*PyTorch +10.0 images/s[\s\S]*ONNX +40.0 images/s", output)
    firsts = [
        name for number, (name, size) in enumerate(calls) if number and calls[number - 1][0] != name and size == 1
    ]
    assert {"PyTorch", "ONNX"} <= set(firsts)
