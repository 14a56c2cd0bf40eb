"""Distillation: the paper's formula, a frozen teacher that sees the student's images, and resumed runs."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_run import CARD, CLASSES, random_weights
from torch import nn
from trainings import config_of, final_weights

from wasteddp import settings as settings_file
from wasteddp import train
from wasteddp.data.batch import Batch
from wasteddp.errors import BundleError, SettingsError
from wasteddp.inference.bundle import load_bundle, save_bundle
from wasteddp.model import networks
from wasteddp.training.distributed import startup
from wasteddp.training.objective import Distilled, NoTeacher, Objective, Taught, Teacher, build_loss, load_teacher


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    save_bundle(tmp_path / "teacher", replace(CARD, temperature=1.7), random_weights())
    return tmp_path / "teacher"


def drawn(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: list[float], temperature: float) -> list[float]:
    total = sum(exp(z / temperature) for z in row)
    return [exp(z / temperature) / total for z in row]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("text", ["", "loss: focal, label_smoothing: 0.1", "logit_adjustment: 1"])
def test_the_loss_is_its_formula_and_its_slope_that_of_finite_differences(text: str, temperature: float) -> None:
    own = build_loss(
        settings_file.parse(f"train: {{{text}}}").train, [5, 3, 2], share_of_classes=[0.5, 0.3, 0.2]
    ).double()
    loss, labels = Distilled(own, 0.3, temperature), torch.tensor([0, 1, 2, 2])
    student, teachers = 2 * drawn(0, 4, 3), 2 * drawn(1, 4, 3)
    distance = 0.0
    for ours, theirs in zip(student.tolist(), teachers.tolist(), strict=True):
        for p, q in zip(softmax(theirs, temperature), softmax(ours, temperature), strict=True):
            distance += p * log(p / q)
    expected = 0.7 * float(own(student, labels)) + 0.3 * temperature**2 * distance
    assert float(loss(student, Taught(labels, teachers))) == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, Taught(labels, teachers)), student.requires_grad_())


def test_at_a_high_temperature_the_slope_is_the_difference_of_the_logits() -> None:
    """Hinton, Vinyals and Dean 2015, eq. 4, for logits of mean 0: their dC/dz is 1 / (N T^2) of this, times T^2."""
    student, teachers = (logits - logits.mean(1, keepdim=True) for logits in (drawn(0, 4, 5), drawn(1, 4, 5)))
    student.requires_grad_()
    Distilled(nn.CrossEntropyLoss(), 1.0, 1e4)(student, Taught(torch.zeros(4, dtype=torch.int64), teachers)).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, (student.detach() - teachers) / 5, rtol=1e-3, atol=1e-4)


def test_a_student_that_answers_like_its_teacher_learns_nothing_from_it() -> None:
    logits = drawn(0, 4, 3).requires_grad_()
    loss = Distilled(nn.CrossEntropyLoss(), 1.0, 2.0)(logits, Taught(torch.tensor([0, 1, 2, 0]), logits.detach()))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


def objective_of(teacher: Path, *overrides: str) -> Objective:
    """A teacher and a student without shards: six images of 24 px, mixed and erased."""
    fixed = ["run.threads=1", "train.batch_size=6", "model.arch=resnet18", "augment.mixup=0.5", "augment.erase=0.5"]
    settings = settings_file.parse("", [*fixed, f"train.teacher={teacher}", *overrides])
    data: Any = SimpleNamespace(
        plan=SimpleNamespace(steps_per_epoch=4),
        manifest=SimpleNamespace(classes=CLASSES),
        train=SimpleNamespace(samples_per_class=(3, 2, 1)),
        share_of_classes=(1 / 2, 1 / 3, 1 / 6),
    )
    return Objective(settings, startup.start_runtime(settings), data, networks.build("resnet18", 3))


def batch() -> Batch:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 24, 24), dtype=np.uint8))
    samples = np.arange(6)
    return Batch(0, 0, pixels, torch.tensor([0, 1, 2, 0, 1, 2]), samples, samples, ())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_sees_what_the_student_sees_and_stays_as_it_is(teacher: Path, precision: str) -> None:
    objective = objective_of(teacher, f"precision={precision}", "train.loss=focal", "train.logit_adjustment=1")
    assert isinstance(objective.teacher, Teacher)
    images, taught = objective.inputs(batch(), 0)
    assert isinstance(taught, Taught)
    assert taught.targets.shape == (6, 3)  # mixed targets
    network = networks.build("resnet18", 3).eval()
    network.load_state_dict(random_weights())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = network.to(memory_format=torch.channels_last)(images).float().detach()  # type: ignore[call-overload]
    assert torch.equal(taught.logits_BK, expected)
    assert taught.logits_BK.dtype == torch.float32
    assert not taught.logits_BK.requires_grad
    kept = objective.teacher.network.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in random_weights().items())
    logits = torch.zeros(6, 3, requires_grad=True)
    objective.loss(logits, taught).backward()
    assert logits.grad is not None
    assert (logits.grad != 0).all()


def test_a_teacher_of_another_size_is_named(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size, found in ((32, False), (48, True)):  # the teacher's card has 32
        settings = settings_file.parse("", [f"train.teacher={teacher}", "data.image_size=96", f"data.eval_size={size}"])
        load_teacher(settings, startup.start_runtime(settings), CLASSES)
        assert ("evaluated at 32 px, this run at 48 px" in capsys.readouterr().out) == found


def test_loading_a_teacher_draws_no_random_numbers(teacher: Path) -> None:
    settings = settings_file.parse("", [f"train.teacher={teacher}"])
    runtime = startup.start_runtime(settings)
    state = torch.get_rng_state()
    found = load_teacher(settings, runtime, CLASSES)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.sha256 == load_bundle(teacher)[0].hashes.weights
    assert f", taught by {teacher} (resnet18, val/macro_f1 50.00% at step 120, {found.sha256[:12]})" in found.words


def test_without_a_teacher_or_its_weight_targets_and_loss_are_what_they_were(teacher: Path) -> None:
    for override in ("train.teacher=''", "train.teacher_weight=0"):
        objective = objective_of(teacher, override)
        assert isinstance(objective.teacher, NoTeacher)
        assert isinstance(objective.inputs(batch(), 0)[1], torch.Tensor)
        assert isinstance(objective._loss, nn.CrossEntropyLoss)


def test_a_teacher_of_other_classes_or_colours_is_refused(teacher: Path) -> None:
    settings = settings_file.parse("", [f"train.teacher={teacher}"])
    runtime = startup.start_runtime(settings)
    with pytest.raises(BundleError, match=r"the classes glass, metal, paper, and the run's are metal, glass, paper,"):
        load_teacher(settings, runtime, ("metal", "glass", "paper"))
    other = replace(CARD, preprocessing=replace(CARD.preprocessing, std=(0.5, 0.5, 0.5)))
    save_bundle(teacher, other, random_weights())
    with pytest.raises(BundleError, match=r"std \[0.5, 0.5, 0.5\], and the run uses"):
        load_teacher(settings, runtime, CLASSES)


@pytest.mark.parametrize("folder", ["runs/a", "runs/a/model", "./runs/b/../a"])
def test_a_run_cannot_teach_itself(folder: str) -> None:
    with pytest.raises(SettingsError, match="which changes during training"):
        settings_file.parse("", ["run.out=runs/a", f"train.teacher={folder}"])


def test_a_taught_run_goes_on_bit_for_bit_and_not_under_another_teacher(
    teacher: Path, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, steps: int) -> int:
        (tmp_path / name).mkdir(exist_ok=True)
        mine = [f"train.teacher={teacher}", f"train.stop_at_step={steps}", "augment.cutmix=1"]
        return train.main([*config_of(tmp_path / name, small_shards), *(f"--set={override}" for override in mine)])

    assert run("whole", 2) == run("parts", 1) == run("parts", 2) == 0
    assert final_weights(tmp_path / "whole" / "run") == final_weights(tmp_path / "parts" / "run")
    sha256 = load_bundle(teacher)[0].hashes.weights
    assert f"taught by {teacher} (resnet18, val/macro_f1 50.00%" in (tmp_path / "parts" / "run" / "log.txt").read_text()
    assert load_bundle(tmp_path / "parts" / "run")[0].hashes.teacher == sha256
    save_bundle(teacher, CARD, random_weights(seed=1))
    capsys.readouterr()
    assert run("parts", 3) == 2
    assert f"teacher was '{sha256}' and is '" in capsys.readouterr().err
