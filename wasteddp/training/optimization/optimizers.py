"""The optimizer, the learning rate as a function of the step, and adaptive gradient clipping.

Adaptive gradient clipping limits the gradient of each unit to a fraction of its weights' norm, so a noisy batch cannot
move a layer far, whatever the scale of the loss. Source: Brock et al. 2021, "High-Performance Large-Scale Image
Recognition Without Normalization", section 4, eq. 3.

Legend: U units, the output channels of all layers that are clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import cos, expm1, floor, log, log1p, pi
from typing import Any

import torch
from torch import nn

from wasteddp.model import resnet
from wasteddp.settings import Optimizer, Schedule, Settings
from wasteddp.training.optimization.lars_lamb import LAMB, LARS

_WARMUP_START = 0.01  # of the peak, because BatchNorm has no statistics yet
_LEAST_SIZE = 1e-3  # of a unit's norm: otherwise weights that start at zero would stay zero


def build(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters, without weight decay on biases and norms.

    To add an optimizer, also add its name to `settings.Optimizer` (then write configs/settings.schema.json again), to
    `checkpoint.state.ONE_MOMENT` if it keeps one moment, and to docs/recipes.md.

    Source of the decay: He et al. 2019, "Bag of Tricks for Image Classification", section 3.1.
    A fused optimizer reads the memory once instead of once per operation: SGD of a ResNet50 takes 14 ms instead of 28
    on two cores.
    """
    groups, lr = list(_groups(model, settings)), settings.lr
    optimizer: torch.optim.Optimizer
    if settings.name == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=settings.momentum, nesterov=nesterov, fused=True)
    elif settings.name == "lars":
        optimizer = LARS(groups, lr, momentum=settings.momentum)
    elif settings.name == "lamb":
        optimizer = LAMB(groups, lr, betas=settings.betas)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name]
        optimizer = kind(groups, lr=lr, betas=settings.betas, fused=True)
    set_learning_rate(optimizer, lr)
    return optimizer


def _groups(model: nn.Module, settings: Optimizer) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups: for each learning rate of a stage, one of weights and one of biases and norms.

    Source of the stages' rates: Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
    section 3.2, discriminative fine-tuning. There each stage has 1 / 2.6 of the rate of the next.
    """
    alike: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = settings.layer_decay ** resnet.distance_from_head(name)
            alike.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    for (scale, adapts), parameters in alike.items():
        decay = settings.weight_decay if adapts else 0.0
        yield {"params": parameters, "weight_decay": decay, "lr_scale": scale, "adapts": adapts}


def learning_rate(step: int, settings: Settings, steps_per_epoch: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0. Cosine: Loshchilov and Hutter 2017."""
    peak, schedule = settings.optimizer.lr, settings.schedule
    total, warmup = steps_per_epoch * settings.train.epochs, round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (_WARMUP_START + (1 - _WARMUP_START) * step / warmup)
    if schedule.name == "constant":
        return peak
    if schedule.name == "step":
        return peak * schedule.step_factor ** (step // (schedule.step_epochs * steps_per_epoch))
    if schedule.name == "cosine_restarts":
        done = _part_of_cycle(step - warmup, schedule, steps_per_epoch)
    else:
        done = (step - warmup) / max(1, total - warmup)
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * (1 + cos(pi * done)) / 2)


def _part_of_cycle(step: int, schedule: Schedule, steps_per_epoch: int) -> float:
    """Return the fraction of the current cycle that is done, in [0, 1). `step` counts from the end of the warm-up.

    With a first cycle of c steps and a factor f, cycle i starts at c (f^i - 1) / (f - 1) and takes c f^i steps. So i is
    the logarithm of 1 + step (f - 1) / c to the base f, rounded down. Source: Loshchilov and Hutter 2017, section 3.
    """
    first, growth = schedule.cycle_epochs * steps_per_epoch, schedule.cycle_factor - 1
    if growth == 0:
        return step % first / first
    # log1p and expm1 keep the digits of a factor such as 1.000001; 1e-9 is less than a step of any run
    number = floor(log1p(step * growth / first) / log(schedule.cycle_factor) + 1e-9)
    begin = first * expm1(number * log(schedule.cycle_factor)) / growth
    return max(0.0, step - begin) / (first * schedule.cycle_factor**number)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the head to `rate`, and those of the other stages in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the optimizer's state by parameter name: {"exp_avg:layer1.0.conv1.weight": tensor, ...}."""
    return {
        f"{key}:{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load the result of `state_tensors`, with the device and memory format of the parameters.

    The format matters: a fused step reads a weight and its momentum in memory order.
    """
    state: dict[int, dict[str, torch.Tensor]] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.partition(":")
        by_name.setdefault(name, {})[key] = tensor
    for number, parameter in enumerate(ordered):
        if names[parameter] in by_name:
            state[number] = {
                key: torch.empty_like(parameter, requires_grad=False).copy_(value) if value.ndim else value
                for key, value in by_name[names[parameter]].items()
            }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def clip_(model: nn.Module, limit: float) -> None:
    """Scale the averaged, unscaled gradient of each unit W_i down to norm `limit` max(|W_i|, 1e-3) if it is larger.

    The head is not clipped, as in the paper. Biases and norms are not clipped either, unlike in the paper: the last
    BatchNorm of each block starts at zero and could only move by limit x 0.001. It does not synchronize with the
    device.
    """
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and parameter.grad is not None and not resnet.is_head(name)
    ]
    if not weights:  # all but the head are frozen
        return
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    allowed_U = limit * _unit_norms(weights).clamp_(min=_LEAST_SIZE)
    factors_U = (allowed_U / _unit_norms(gradients)).clamp_(max=1)  # a zero gradient gives infinity, clamped to 1
    parts = torch.split(factors_U, [len(weight) for weight in weights])
    torch._foreach_mul_(gradients, [p.view(-1, *[1] * (w.ndim - 1)) for p, w in zip(parts, weights, strict=True)])


def _unit_norms(tensors: list[torch.Tensor] | list[nn.Parameter]) -> torch.Tensor:
    """Return the norm of each output channel (first axis) of all tensors, [U]."""
    return torch.cat([torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim))) for tensor in tensors])
