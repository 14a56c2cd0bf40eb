"""The optimizer of a run, its state by parameter name, and adaptive gradient clipping.

Adaptive gradient clipping limits the gradient of each unit to a fraction of its weights' norm, so a noisy batch cannot
move a layer far, whatever the scale of the loss. Source: Brock et al. 2021, "High-Performance Large-Scale Image
Recognition Without Normalization", section 4, eq. 3.

Legend: U units, the output channels of all layers that are clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any, assert_never

import torch
from torch import nn

from wasteddp.model.networks import head_name
from wasteddp.model.stages import Stages
from wasteddp.settings import Model, Optimizer, Schedule
from wasteddp.training import schedule
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.lars_lamb import LAMB, LARS

ONE_MOMENT = ("sgd", "lars")  # optimizers that keep one number per weight; the others keep two
_LEAST_SIZE = 1e-3  # of a unit's norm: otherwise weights that start at zero would stay zero


def build(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters, without weight decay on biases and norms.

    To add an optimizer, also add its name to `settings.Optimizer` (then write configs/settings.schema.json again), to
    `ONE_MOMENT` if it keeps one moment, and to docs/recipes.md. Where `found_inf` is 1, its step must change neither
    weights nor state, as torch's fused optimizers do; `lars_lamb` has an example. The tests take the names from the
    settings.

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
    elif settings.name == "adam":
        optimizer = torch.optim.Adam(groups, lr=lr, betas=settings.betas, fused=True)
    elif settings.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=settings.betas, fused=True)
    else:
        assert_never(settings.name)  # mypy reports a name that has no branch
    set_learning_rate(optimizer, lr)
    return optimizer


def _groups(model: nn.Module, settings: Optimizer) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups: for each learning rate of a stage, one of weights and one of biases and norms.

    Source of the stages' rates: Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
    section 3.2, discriminative fine-tuning. There each stage has 1 / 2.6 of the rate of the next.
    """
    stages = Stages(model)
    alike: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = settings.layer_decay ** stages.distance_from_head(name)
            alike.setdefault((scale, _is_matrix(name, parameter)), []).append(parameter)
    for (scale, adapts), parameters in alike.items():
        decay = settings.weight_decay if adapts else 0.0
        yield {"params": parameters, "weight_decay": decay, "lr_scale": scale, "adapts": adapts}


class ScheduledOptimizer:
    """The optimizer of a training loop: with its learning-rate schedule, gradual unfreezing and gradient clipping.

    It has no state but that of the optimizer: rate and frozen stages follow from the step.

    Args:
        network: not wrapped, on the device, with frozen stages.
        optimizer: of the network, not wrapped.
        scaled: the optimizer as Accelerate wraps it, with the loss scale of fp16.
        settings, rates, model, epochs: the sections optimizer, schedule and model, and train.epochs.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaled: Any,
        *,
        runtime: Runtime,
        settings: Optimizer,
        rates: Schedule,
        model: Model,
        epochs: int,
        steps_per_epoch: int,
    ) -> None:
        self.unwrapped, self.scaled = optimizer, scaled
        self._network, self._stages, self._runtime = network, Stages(network), runtime
        self._settings, self._rates, self._model = settings, rates, model
        self._epochs, self._steps_per_epoch = epochs, steps_per_epoch
        self._frozen: str = model.freeze  # in the current step

    def begin_step(self, progress: Progress) -> float:
        """Set the network to training mode and the learning rate for a step, and return the rate."""
        epoch = progress.step / self._steps_per_epoch
        self._frozen = schedule.frozen_at(self._model.freeze, self._model.unfreeze_every_epochs, epoch)
        self._stages.train_mode(self._frozen)
        rate = progress.lr_factor * schedule.learning_rate(
            progress.step, self._settings.lr, self._rates, epochs=self._epochs, steps_per_epoch=self._steps_per_epoch
        )
        set_learning_rate(self.unwrapped, rate)
        return rate

    def zero_grad(self) -> None:
        self.scaled.zero_grad()

    def clip(self, *, is_asked: bool) -> torch.Tensor | None:
        """Clip the averaged gradient of the trained parameters, after the last backward pass. All ranks.

        Returns:
            The norm before clipping, []; None if it is neither requested nor needed. On a CPU it takes 1 % of a step.
        """
        self._stages.drop_gradients(self._frozen)
        adaptive, limit = self._settings.adaptive_clip, self._settings.clip_norm
        if not adaptive and not limit and not is_asked:
            return None
        before = inf if adaptive else limit or inf
        norm: torch.Tensor = self._runtime.accelerator.clip_grad_norm_(self._network.parameters(), before)
        if adaptive:
            clip_(self._network, adaptive)
            if limit:  # not with Accelerate, which would unscale the gradients again: GradScaler refuses that
                nn.utils.clip_grad_norm_(self._network.parameters(), limit)
        return norm

    def step(self, found_inf: torch.Tensor | None = None) -> None:
        """Update the weights. All ranks.

        Args:
            found_inf: float [] on the device, 1: a fused optimizer leaves weights and state unchanged.
        """
        if found_inf is not None:
            self.unwrapped.found_inf = found_inf  # type: ignore[attr-defined]
        self.scaled.step()


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether it is a weight of a convolution or a linear layer, and not a bias, a scale or an embedding."""
    return parameter.ndim > 1 and name.endswith("weight")


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
    head = f"{head_name(model)}."
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if _is_matrix(name, parameter) and parameter.grad is not None and not name.startswith(head)
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
