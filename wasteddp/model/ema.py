"""A moving average of a network's weights: what a run with train.ema_decay evaluates, keeps as its best and hands on.

Behind optimizer step t (the first is 0), for every parameter and every running statistic of BatchNorm:

    average <- average + (1 - d(t)) * (network - average)        d(t) = min(decay, (1 + t) / (10 + t))

SGD's weights jump about a minimum and their mean lies nearer to it. d(t) is a function of the step alone; while it is
small, the first weights, which are worth nothing, are soon forgotten.
Source: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; the exponential form as in
EfficientNet's program (Tan and Le 2019); d(t) as in TensorFlow's tf.train.ExponentialMovingAverage with num_updates.

The statistics are averaged like the weights: those of the network belong to its newest weights, and the average's
weights are older by 1 / (1 - decay) steps; in one pass both stay of one age. Other buffers, which count, are copied.

The average is a network of its own. Its memory would be needed anyway, for the numbers; and nothing is swapped in and
out of the network that trains, so no error in an evaluation can leave it with other weights than its optimizer's.
It is finite as long as the network is, so whoever looks at the network's weights before a save looks at both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

STATE = "ema"  # its name in a checkpoint


class Average(Protocol):
    """What a run makes of its weights, step by step."""

    network: nn.Module
    """To be evaluated and handed on."""
    states: Mapping[str, nn.Module]
    """What a checkpoint must hold of it."""

    def update(self, step: int, skipped: torch.Tensor | None) -> None:
        """Behind the optimizer's step, which must not wait for the device.

        Args:
            step: optimizer steps done before this one.
            skipped: where steps may be: whether this one was, and changed nothing; bool [] on the device.
        """


class NoAverage:
    """The weights as the optimizer leaves them.

    Args:
        network: as Accelerate prepared it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network: nn.Module = network
        self.states: Mapping[str, nn.Module] = {}

    def update(self, step: int, skipped: torch.Tensor | None) -> None:
        pass


class Ema:
    """The average of `model`; at first a copy of it.

    Parameters are the same on all ranks; running statistics are this rank's own, as those of `model` are.

    Args:
        model: bare, after Accelerate's `prepare`: with rank 0's weights, and with the autocast that it lays around
            `forward`, of which the copy has one of its own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self.network: nn.Module = copy.deepcopy(model).requires_grad_(False).eval()
        self.states: Mapping[str, nn.Module] = {STATE: self.network}
        ours, theirs = ([*network.parameters(), *network.buffers()] for network in (self.network, model))
        self._averages, self._live = (
            [tensor for tensor in tensors if tensor.is_floating_point()] for tensors in (ours, theirs)
        )
        self._copies, self._copied = (
            [tensor for tensor in tensors if not tensor.is_floating_point()] for tensors in (ours, theirs)
        )

    @torch.no_grad()
    def update(self, step: int, skipped: torch.Tensor | None) -> None:
        weight = 1 - decay_at(step, self._decay)
        if skipped is None:
            torch._foreach_lerp_(self._averages, self._live, weight)
        else:
            # In place, like the line above; a difference that is made and scaled first would be fresh memory for all
            # the weights: 250 ms of a ResNet50 instead of 20 on a CPU. On a GPU it is a kernel for each tensor.
            weights = [torch.where(skipped, 0.0, weight)] * len(self._averages)
            torch._foreach_lerp_(self._averages, self._live, weights)
        if self._copies:  # torch refuses empty lists
            torch._foreach_copy_(self._copies, self._copied)


def average_of(decay: float, model: nn.Module, prepared: nn.Module) -> Average:
    """The average that train.ema_decay asks for; `model` is what lies bare inside of `prepared`."""
    return Ema(model, decay) if decay else NoAverage(prepared)


def decay_at(step: int, decay: float) -> float:
    """d(t) for `step` steps done before."""
    return min(decay, (1 + step) / (10 + step))
