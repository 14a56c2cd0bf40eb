"""LARS and LAMB compared with plain references, skipped steps, and states that are restored exactly."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from gpu_waits import Reads
from torch import nn

from wasteddp import settings
from wasteddp.training import optimizers as optim
from wasteddp.training.lars_lamb import LAMB, LARS

Arrays = dict[str, Any]  # float64 arrays by parameter name
DECAY = 0.2


def model_of(seed: int = 0) -> nn.Sequential:
    """A layer of zeros, whose norm cannot scale a step, and a BatchNorm, which is not adapted."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1, bias=False))
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    return model


def gradients(model: nn.Module, step: int) -> Arrays:
    generator = np.random.default_rng(step)
    return {name: generator.normal(size=p.shape) for name, p in model.named_parameters()}


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, values: Arrays) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = torch.from_numpy(values[name]).float() if name in values else None
    optimizer.step()


def norm(values: Any) -> float:
    return sqrt(sum(float(value) ** 2 for value in values.flat))


def reference(name: str, weights: Arrays, steps: list[Arrays], rates: list[float]) -> Arrays:
    """Compute the formulas of the docstrings for each parameter in float64; a missing gradient is zero."""
    weights = dict(weights)
    m, v, t = ({key: np.zeros_like(w) for key, w in weights.items()} for _ in range(3))
    for given, rate in zip(steps, rates, strict=True):
        for key, g in given.items():
            w, decay = weights[key], DECAY if weights[key].ndim > 1 else 0.0
            if name == "lars":
                ratio = 1.0
                if w.ndim > 1 and norm(w) > 0 and norm(g) > 0:
                    ratio = 0.001 * norm(w) / (norm(g) + decay * norm(w))
                m[key] = 0.9 * m[key] + ratio * (g + decay * w)
                weights[key] = w - rate * m[key]
            else:
                t[key] = t[key] + 1
                m[key], v[key] = 0.9 * m[key] + 0.1 * g, 0.99 * v[key] + 0.01 * g**2
                u = m[key] / (1 - 0.9 ** t[key]) / (np.sqrt(v[key] / (1 - 0.99 ** t[key])) + 1e-6) + decay * w
                ratio = norm(w) / norm(u) if w.ndim > 1 and norm(w) > 0 and norm(u) > 0 else 1.0
                weights[key] = w - rate * ratio * u
    return weights


def built(name: str, model: nn.Module) -> torch.optim.Optimizer:
    text = f"optimizer: {{name: {name}, lr: 1.0, betas: [0.9, 0.99], weight_decay: {DECAY}}}"
    return optim.build(model, settings.parse(text).optimizer)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_steps_are_those_of_a_plain_loop(name: str) -> None:
    model = model_of()
    optimizer = built(name, model)
    assert isinstance(optimizer, LARS if name == "lars" else LAMB)
    before = {key: p.detach().double().numpy().copy() for key, p in model.named_parameters()}
    steps = [gradients(model, step) for step in range(6)]
    steps[2]["0.weight"][:] = 0  # a zero gradient
    del steps[3]["1.weight"], steps[4]["0.weight"]  # frozen in these steps: neither updated nor counted
    rates = [0.1, 0.5, 0.3, 0.3, 0.2, 0.1]
    for rate, values in zip(rates, steps, strict=True):
        optim.set_learning_rate(optimizer, rate)
        stepped(model, optimizer, values)
    for key, expected in reference(name, before, steps, rates).items():
        found = model.get_parameter(key).detach().numpy()
        assert found == pytest.approx(expected, rel=2e-5, abs=2e-6), key


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_a_step_of_a_layer_is_in_proportion_to_its_weights(name: str) -> None:
    """The step does not depend on the scale of the gradient."""
    moved = []
    for scale in (1.0, 1000.0):
        layer = nn.Linear(4, 3, bias=False)
        nn.init.constant_(layer.weight, 2.0)
        optimizer = LARS(layer.parameters(), 1.0) if name == "lars" else LAMB(layer.parameters(), 1.0)
        layer.weight.grad = scale * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        moved.append(float((layer.weight.detach() - 2).norm() / sqrt(12 * 4)))
    assert moved == pytest.approx([0.001, 0.001] if name == "lars" else [1.0, 1.0], rel=1e-4)


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize("skipped_first", [False, True])
def test_a_step_with_found_inf_changes_nothing(name: str, skipped_first: bool) -> None:
    clean, poisoned = model_of(), model_of()
    optimizers = built(name, clean), built(name, poisoned)
    for step in range(4):
        values = gradients(clean, step)
        stepped(clean, optimizers[0], values)
        bad = {key: np.full(value.shape, np.nan if step % 2 else np.inf) for key, value in values.items()}
        for given in (bad, values) if skipped_first else (values, bad):
            optimizers[1].found_inf = torch.tensor(float(given is bad))  # type: ignore[attr-defined]
            stepped(poisoned, optimizers[1], given)
    states = [
        model.state_dict() | optim.state_tensors(optimizer, model)
        for model, optimizer in zip((clean, poisoned), optimizers, strict=True)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize("unscaled_before", [False, True])
def test_a_loss_scale_is_taken_off_and_infinite_gradients_are_skipped(name: str, unscaled_before: bool) -> None:
    """torch's GradScaler on the CPU; clipping unscales before the step."""
    plain, scaled = model_of(), model_of()
    optimizers = built(name, plain), built(name, scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        values = gradients(plain, step)
        stepped(plain, optimizers[0], values)
        for infinite in (False, True):
            scaler.scale(torch.zeros(()))  # creates the scale, as scaling a loss does
            scale = scaler.get_scale()
            for key, parameter in scaled.named_parameters():
                parameter.grad = torch.from_numpy(values[key]).float() * scale
            if infinite:
                scaled[0].weight.grad[0, 0, 0, 0] = float("inf")  # type: ignore[union-attr, index]
            if unscaled_before:
                scaler.unscale_(optimizers[1])
            scaler.step(optimizers[1])
            scaler.update()
    assert scaler.get_scale() == 1024 / 2**3
    for key, parameter in plain.named_parameters():
        assert torch.equal(parameter, scaled.get_parameter(key)), key


def test_momentum_of_lars_keeps_its_place_when_the_rate_changes() -> None:
    """The rate is outside the momentum: with a rate of zero no weight moves, whatever the momentum."""
    model = model_of()
    optimizer = built("lars", model)
    stepped(model, optimizer, gradients(model, 0))
    before = [p.clone() for p in model.parameters()]
    optim.set_learning_rate(optimizer, 0.0)
    stepped(model, optimizer, gradients(model, 1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize("given", [(), ("found_inf",), ("found_inf", "grad_scale")])
def test_a_step_reads_no_number_from_the_device(name: str, given: tuple[str, ...]) -> None:
    """Counted on a CPU; on a GPU each read would block the host."""
    model = model_of()
    optimizer = built(name, model)
    for attribute in given:
        setattr(optimizer, attribute, torch.ones(()) if attribute == "grad_scale" else torch.zeros(()))
    for step in range(2):
        values = gradients(model, step)
        with Reads() as reads:
            stepped(model, optimizer, values)
        assert reads.count == 0


@pytest.mark.parametrize("found", [None, 0.0, 1.0])
def test_steps_of_lamb_are_counted_bit_for_bit(found: float | None) -> None:
    model = model_of()
    optimizer = built("lamb", model)
    if found is not None:
        optimizer.found_inf = torch.tensor(found)  # type: ignore[attr-defined]
    for step in range(3):
        stepped(model, optimizer, gradients(model, step))
    counts = {name: t for name, t in optim.state_tensors(optimizer, model).items() if name.startswith("num_steps:")}
    assert len(counts) == len(list(model.parameters()))
    assert all(torch.equal(count, torch.tensor(0.0 if found else 3.0)) for count in counts.values())
