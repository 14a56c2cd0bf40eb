"""Optimizer and learning rate: pure functions of the settings and the step."""

from __future__ import annotations

from math import cos, pi

import torch
from torch import nn

from wasteddp.settings import Optimizer, Settings

_WARMUP_START = 0.01  # of the peak: BatchNorm has seen nothing yet


def build(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW over the trainable parameters, without decay on biases and norms.

    Source of the exception: He et al. 2019, "Bag of Tricks for Image Classification", section 3.1.
    Fused: one pass over the memory instead of one an operation; SGD of a ResNet50 takes 14 ms, not 28, on two cores.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=True)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=settings.lr, betas=settings.betas, fused=True)


def learning_rate(step: int, settings: Settings, steps_per_epoch: int) -> float:
    """The rate of optimizer step `step` (0 is the first). Source of the cosine: Loshchilov and Hutter 2017."""
    peak, schedule = settings.optimizer.lr, settings.schedule
    total, warmup = steps_per_epoch * settings.train.epochs, round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (_WARMUP_START + (1 - _WARMUP_START) * step / warmup)
    if schedule.name == "constant":
        return peak
    if schedule.name == "step":
        return peak * schedule.step_factor ** (step // (schedule.step_epochs * steps_per_epoch))
    done = (step - warmup) / max(1, total - warmup)
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * (1 + cos(pi * done)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name: {"exp_avg:layer1.0.conv1.weight": tensor, ...}."""
    return {
        f"{key}:{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `state_tensors`; device and memory format follow the parameters.

    The format matters: a fused step walks through a weight and its momentum in the order of their memory.
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
