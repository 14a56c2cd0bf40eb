"""Rates of stages, decay, and optimizer states that are restored exactly."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from wasteddp import settings
from wasteddp.model import networks
from wasteddp.model.stages import Stages
from wasteddp.settings import Optimizer
from wasteddp.training import optimizers
from wasteddp.training.checkpoint.state import room_for_checkpoint

NAMES = get_args(Optimizer.model_fields["name"].annotation)


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_has_its_part_of_the_rate_and_biases_and_norms_still_do_not_decay(name: str) -> None:
    model = networks.build("resnet18", 3)
    Stages(model).freeze("stem")
    text = f"optimizer: {{name: {name}, layer_decay: 0.5, lr: 0.8, weight_decay: 0.3}}"
    optimizer = optimizers.build(model, settings.parse(text).optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for peak in (0.8, 0.2):
        found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        for number, stage in enumerate(("layer1", "layer2", "layer3", "layer4", "fc")):
            rate = peak * 0.5 ** (4 - number)
            for name, (lr, decay) in found.items():
                if name.startswith(stage):
                    assert lr == rate
                    assert decay == (0.3 if model.get_parameter(name).ndim > 1 else 0.0)
        optimizers.set_learning_rate(optimizer, 0.2)


def test_a_state_is_taken_over_by_other_groups() -> None:
    """A run may resume with other rates for its stages, because states are stored by parameter name."""
    model = networks.build("resnet18", 3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = optimizers.build(model, settings.parse("").optimizer)
    optimizer.step()
    stored = {key: value.clone() for key, value in optimizers.state_tensors(optimizer, model).items()}
    other = optimizers.build(model, settings.parse("optimizer: {layer_decay: 0.5}").optimizer)
    assert len(other.param_groups) == 12
    optimizers.load_state_tensors(other, model, stored)
    assert all(torch.equal(stored[key], value) for key, value in optimizers.state_tensors(other, model).items())


@pytest.mark.parametrize("name", NAMES)
def test_biases_and_norms_do_not_decay(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = optimizers.build(model, settings.parse(f"optimizer: {{name: {name}, weight_decay: 0.3}}").optimizer)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "3.weight": 0.3, "3.bias": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_goes_on_from_its_tensors_as_if_nothing_had_been(name: str) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(8, 5, generator=generator)).square().sum().backward()
        optimizer.step()

    parsed = settings.parse(f"optimizer: {{name: {name}, lr: 0.01, weight_decay: 0.1}}").optimizer
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    optimizer = optimizers.build(whole, parsed)
    step(whole, optimizer, 1)
    step(whole, optimizer, 2)
    resumed = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    resumed.load_state_dict({key: value.clone() for key, value in whole.state_dict().items()})
    again = optimizers.build(resumed, parsed)
    tensors = {key: value.clone() for key, value in optimizers.state_tensors(optimizer, whole).items()}
    assert len(tensors) == 6 * (1 if name in ("sgd", "lars") else 3)
    # the largest state: as many numbers as the weights, and one per parameter
    room = room_for_checkpoint(sum(p.nbytes for p in whole.parameters()), optimizer=name, ema_decay=0)
    assert 0 <= sum(p.nbytes for p in [*whole.parameters(), *tensors.values()]) - room <= 4 * 6
    optimizers.load_state_tensors(again, resumed, tensors)
    step(whole, optimizer, 3)
    step(resumed, again, 3)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_takes_the_memory_format_of_its_weight(name: str) -> None:
    """A fused step on a channels-last weight and a contiguous momentum would mix up their elements."""
    parsed = settings.parse(f"optimizer: {{name: {name}, lr: 0.01}}").optimizer
    whole, resumed = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(1, 1)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for _ in range(2)
    )
    optimizer, again = optimizers.build(whole, parsed), optimizers.build(resumed, parsed)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        weight = model.get_parameter("0.weight")
        weight.grad = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
        weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)
        optimizer.step()

    step(whole, optimizer, 1)
    resumed.load_state_dict(whole.state_dict())
    stored = {key: value.clone().contiguous() for key, value in optimizers.state_tensors(optimizer, whole).items()}
    optimizers.load_state_tensors(again, resumed, stored)
    step(whole, optimizer, 2)
    step(resumed, again, 2)
    assert torch.equal(whole[0].weight, resumed[0].weight)
