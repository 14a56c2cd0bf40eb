"""The precision and compilation of `auto`, from a measurement or from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from wasteddp import settings
from wasteddp.errors import SettingsError
from wasteddp.training.checkpoint.reader import kept_choices
from wasteddp.training.distributed import compilation, precision
from wasteddp.training.distributed.precision import NOTHING_KEPT, Kept


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or True)
    return monkeypatch


def choose(asked: str, speeds: dict[str, float], kept: Kept = NOTHING_KEPT, **further: Any) -> precision.Precision:
    def measure(names: Sequence[str]) -> dict[str, float]:
        return {name: speeds[name] for name in names} if speeds else {}

    return precision.choose(asked, has_gpu=True, kept=kept, measure=measure, **further)


@pytest.mark.parametrize(
    ("fp16", "name"), [(5871.0, "fp16"), (1.06 * 4574, "fp16"), (1.04 * 4574, "bf16"), (3000.0, "bf16")]
)
def test_the_faster_one_is_taken_if_it_is_worth_a_loss_scale(card: pytest.MonkeyPatch, fp16: float, name: str) -> None:
    chosen = choose("auto", {"bf16": 4574.0, "fp16": fp16})
    assert chosen.name == name
    assert chosen.reason == f"measured on a card without compilation: bf16 4,574 images/s, fp16 {fp16:,.0f}"
    assert chosen.images_per_s["bf16"] == 4574


def test_what_cannot_be_measured_is_bf16_and_reports_it(card: pytest.MonkeyPatch) -> None:
    chosen = choose("auto", {})
    assert chosen.name == "bf16"
    assert "too little free memory" in chosen.reason


@pytest.mark.parametrize("kept", ["bf16", "fp16", "fp32"])
def test_a_run_that_goes_on_is_not_measured_again(card: pytest.MonkeyPatch, kept: str) -> None:
    chosen = precision.choose("auto", has_gpu=True, kept=Kept(kept), measure=lambda _: pytest.fail("measured"))
    assert (chosen.name, chosen.reason) == (kept, "as in the checkpoint")


def test_what_is_set_is_taken_and_measured_only_where_it_is_asked(card: pytest.MonkeyPatch) -> None:
    assert choose("bf16", {"bf16": 7.0}).images_per_s == {}
    assert choose("bf16", {"bf16": 7.0}, is_speed_asked=True).images_per_s == {"bf16": 7.0}


def test_nothing_is_measured_where_two_runs_must_choose_the_same(card: pytest.MonkeyPatch) -> None:
    chosen = choose("auto", {"bf16": 1.0, "fp16": 2.0}, may_measure=False, is_speed_asked=True)
    assert (chosen.name, chosen.images_per_s) == ("bf16", {})
    assert choose("auto", {"bf16": 1.0, "fp16": 2.0}, Kept("fp16"), may_measure=False).name == "fp16"


def test_older_cards(card: pytest.MonkeyPatch) -> None:
    card.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose("auto", {"fp16": 1.0}).name == "fp16"
    assert choose("auto", {"fp16": 1.0}, Kept("bf16")).name == "fp16"  # a run from a newer card
    assert "emulates bf16, which is slower than fp16" in choose("bf16", {}).reason
    card.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert choose("auto", {"fp16": 1.0}).name == "fp32"


def test_measuring_leaves_no_trace_in_random_numbers() -> None:
    parsed = settings.parse("model: {arch: resnet18}\ndata: {image_size: 32}\ntrain: {max_micro_batch: 4}")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    speeds = precision.measure(
        parsed.model,
        torch.device("cpu"),
        ("fp32", "bf16"),
        image_size=parsed.data.image_size,
        max_micro_batch=parsed.train.max_micro_batch,
    )
    assert torch.equal(torch.rand(3), expected)
    assert speeds.keys() == {"fp32", "bf16"}
    assert min(speeds.values()) > 0


def test_lacking_memory_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(precision.networks, "build", fail)
    assert (
        precision.measure(settings.parse("").model, torch.device("cpu"), ("fp32",), image_size=224, max_micro_batch=0)
        == {}
    )


# --- what a run keeps ------------------------------------------------------------------------------------------------


def checkpoint(run: Path, step: int, content: str) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        ({"precision": "fp16", "compiles": True}, Kept("fp16", True)),
        ({"precision": "bf16", "compiles": False}, Kept("bf16", False)),
        ({"scaler": {"scale": 2.0}}, Kept("fp16")),  # written before the precision was recorded
        ({}, Kept("bf16")),
    ],
)
def test_the_newest_checkpoint_names_what_a_run_keeps(tmp_path: Path, found: dict[str, Any], kept: Kept) -> None:
    checkpoint(tmp_path, 3, json.dumps({"precision": "fp32"}))
    newest = checkpoint(tmp_path, 10, json.dumps(found))
    assert kept_choices(tmp_path, "auto") == kept
    assert kept_choices(tmp_path / "other", str(newest)) == kept
    assert kept_choices(tmp_path, "never") == NOTHING_KEPT
    assert kept_choices(tmp_path / "other", "auto") == NOTHING_KEPT


def test_a_run_that_has_gone_on_keeps_its_own_choices(tmp_path: Path) -> None:
    asked = checkpoint(tmp_path / "other", 5, json.dumps({"precision": "fp16"}))
    checkpoint(tmp_path, 3, json.dumps({"precision": "bf16"}))
    assert kept_choices(tmp_path, str(asked)) == Kept("fp16")
    checkpoint(tmp_path, 7, json.dumps({"precision": "bf16"}))
    assert kept_choices(tmp_path, str(asked)) == Kept("bf16")


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3, json.dumps({"precision": "fp16"}))
    checkpoint(tmp_path, 4, "{")
    checkpoint(tmp_path, 5, "[1]")
    assert kept_choices(tmp_path, "auto") == Kept("fp16")


# --- whether to compile ----------------------------------------------------------------------------------------------


def decide(asked: bool | str = "auto", **changes: Any) -> compilation.Decision:
    work = compilation.Work(changes.pop("num_images", 10**7), changes.pop("num_graphs", 2))
    known = {"kept": None, "gain": 1.4, "images_per_s": 4500.0, "lacking": ""}
    return compilation.decide(asked, work=work, **known | changes)


def test_a_long_run_is_compiled_and_a_short_one_is_not() -> None:
    long, short = decide(), decide(num_images=10**6)
    assert long.compiles
    assert long.reason == "estimate: saves 635 s of 2,222 s, costs 124 s to compile 2 graphs"
    assert not short.compiles  # it would save 63 s
    assert not decide(num_graphs=6).compiles  # as with five image sizes


@pytest.mark.parametrize(
    ("changes", "compiles"),
    [
        ({"asked": True}, True),
        ({"asked": False}, False),
        ({"asked": True, "num_images": 1}, True),
        ({"kept": True, "num_images": 1}, True),
        ({"kept": False}, False),
        ({"kept": True, "lacking": "there is no C compiler"}, False),
        ({"gain": 1.0}, False),
        ({"is_deterministic": True}, False),
        ({"images_per_s": 0.0}, False),
    ],
)
def test_what_else_decides(changes: dict[str, Any], compiles: bool) -> None:
    decision = decide(**changes)
    assert decision.compiles is compiles
    assert decision.reason


def test_graphs_and_images_are_counted() -> None:
    def work(text: str) -> tuple[float, int]:
        counted = compilation.Work.of(settings.parse(text), steps_per_epoch=10, images_a_step=8)
        return counted.num_images, counted.num_graphs

    assert work("train: {epochs: 3}") == (240, 2)  # training and evaluation
    assert work("train: {epochs: 3, stop_at_step: 15}") == (120, 2)
    growing = "data: {image_size: 128}\nschedule: {start_size: 64, full_size_at: 0.5}\ntrain: {epochs: 4}"
    assert work(growing) == (80 * (0.25 + 0.5625 + 1 + 1), 4)  # 64, 96, 128 and 128 px
    unfreezing = "model: {freeze: backbone, unfreeze_every_epochs: 1}\n"
    assert work(unfreezing + "train: {epochs: 3}") == (240, 4)
    assert work(unfreezing + "train: {epochs: 9}") == (720, 1 + 6)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compilation, "find_spec", lambda _: object())
    monkeypatch.setattr(compilation.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None if name in ("gcc", "clang") else name)
    found = compilation.what_is_lacking({})
    assert found == "there is no C compiler: gcc or clang (on Debian and Ubuntu: apt-get install gcc)"
    with pytest.raises(SettingsError, match=r"model\.compile is true, and there is no C compiler"):
        compilation.refuse_without_compiler(found)
    assert "Python.h is missing" in compilation.what_is_lacking({"CC": "ccache gcc"})
    (tmp_path / "Python.h").touch()
    assert compilation.what_is_lacking({"CC": "ccache gcc"}) == ""
    compilation.refuse_without_compiler("")
    monkeypatch.setattr(compilation, "find_spec", lambda _: None)
    assert compilation.what_is_lacking({}) == "Triton is not installed (pip install triton)"


def test_compiled_code_is_kept_and_a_folder_of_the_users_is_left_alone(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    compilation.keep_compiled_code(environment)
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "wasteddp-compiled")
    environment["TORCHINDUCTOR_CACHE_DIR"] = "/mine"
    compilation.keep_compiled_code(environment)
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    (tmp_path / "file").touch()
    impossible = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    compilation.keep_compiled_code(impossible)
    assert "TORCHINDUCTOR_CACHE_DIR" not in impossible


@pytest.mark.parametrize("value", ["auto", "true", "false"])
def test_older_settings_still_load(value: str) -> None:
    assert str(settings.parse(f"model: {{compile: {value}}}").model.compile).lower() == value
