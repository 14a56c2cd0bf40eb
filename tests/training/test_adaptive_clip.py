"""Adaptive gradient clipping compared with a plain loop over the paper's equation."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wasteddp import settings
from wasteddp.model import networks
from wasteddp.model.stages import Stages
from wasteddp.training import optimizers


def network(scale: float) -> nn.Module:
    torch.manual_seed(0)
    model = networks.build("resnet18", 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("limit", [0.01, 0.5])
def test_each_unit_is_clipped_by_the_equation_and_head_biases_and_norms_are_not(limit: float) -> None:
    model = network(0.02)
    with torch.no_grad():
        model.conv1.weight[0] = 0  # clipped as if its norm were 0.001
        model.conv1.weight.grad[1] = 0  # a zero gradient: nothing to clip, and no division by zero
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizers.clip_(model, limit)
    num_clipped = num_units = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if parameter.ndim == 1 or name.startswith("fc."):
            assert torch.equal(parameter.grad, before[name])
            continue
        for unit, weight in enumerate(parameter):
            old = before[name][unit]
            size = max(float(weight.detach().norm()), 1e-3)
            norm = float(old.norm())
            expected = old * (limit * size / norm) if norm / size > limit else old
            torch.testing.assert_close(parameter.grad[unit], expected, rtol=1e-5, atol=1e-9)
            num_clipped, num_units = num_clipped + (norm / size > limit), num_units + 1
    assert 0 < num_clipped < num_units


def test_what_has_no_gradient_is_left_out_even_if_that_is_all_but_the_head() -> None:
    model = network(1.0)
    model.layer2.zero_grad()
    optimizers.clip_(model, 0.01)
    assert model.layer2[0].conv1.weight.grad is None
    assert float(model.conv1.weight.grad.norm()) < 1
    Stages(model).drop_gradients("backbone")
    optimizers.clip_(model, 0.01)
    assert model.fc.weight.grad is not None


class _HalfPrecision:
    """Accelerate with fp16: it unscales the gradients before it clips, which GradScaler allows once per step."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self._optimizer, self._scaler = optimizer, scaler

    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
        self._scaler.unscale_(self._optimizer)
        return nn.utils.clip_grad_norm_(parameters, limit)


@pytest.mark.parametrize("limit", [0.0, 0.05])
def test_clipping_comes_after_the_loss_scale_and_returns_the_norm_before_it(limit: float) -> None:
    model, expected = network(0.02), network(0.02)
    norm = nn.utils.get_total_norm([p.grad for p in expected.parameters() if p.grad is not None])
    optimizers.clip_(expected, 0.1)
    if limit:
        nn.utils.clip_grad_norm_(expected.parameters(), limit)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad *= 1024
    runtime = SimpleNamespace(accelerator=_HalfPrecision(optimizer, scaler))
    parsed = settings.parse(f"optimizer: {{adaptive_clip: 0.1, clip_norm: {limit}}}")
    scheduled = optimizers.ScheduledOptimizer(
        model,
        optimizer,
        optimizer,
        runtime=runtime,  # type: ignore[arg-type]
        settings=parsed.optimizer,
        rates=parsed.schedule,
        model=parsed.model,
        epochs=1,
        steps_per_epoch=1,
    )
    assert scheduled.clip(is_asked=False) == norm
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected.get_parameter(name).grad), name  # type: ignore[arg-type]
