"""Exponential moving average of a network's weights, which a run with train.ema_decay evaluates, saves and exports.

After optimizer step t (the first is 0), for every parameter and every running statistic of BatchNorm:

    average <- average + (1 - d(t)) * (network - average)        d(t) = min(decay, (1 + t) / (10 + t))

SGD's weights oscillate around a minimum, and their mean is closer to it. d(t) depends on the step only. It is small in
the first steps, so the average soon forgets the useless first weights.
Sources: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; the exponential form is that
of EfficientNet's program (Tan and Le 2019); d(t) is that of TensorFlow's tf.train.ExponentialMovingAverage with
num_updates.

The running statistics are averaged like the weights. The network's statistics belong to its newest weights, but the
averaged weights are older by about 1 / (1 - decay) steps; averaging both keeps them of the same age. Other buffers,
which are counters, are copied.

The average is a separate network. The averaged numbers need its memory anyway, and no weights are swapped in and out of
the network that trains, so an error in an evaluation cannot leave it with the wrong weights. The average is finite as
long as the network is, so a check of the network's weights before a save covers both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

STATE = "ema"  # name of the average in a checkpoint


class Average(Protocol):
    """An average of a network's weights, updated after each step."""

    network: nn.Module
    """The network to evaluate and export."""
    states: Mapping[str, nn.Module]
    """Modules that a checkpoint must contain, by name."""

    def update(self, step: int, skipped: torch.Tensor | None) -> None:
        """Update the average after an optimizer step, without waiting for the device.

        Args:
            step: optimizer steps done before this one.
            skipped: whether this step was skipped, so that the average must not change: bool [] on the device. None if
                steps are never skipped.
        """


class NoAverage:
    """No average: evaluations use the weights of the network itself.

    Args:
        network: as prepared by Accelerate.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network: nn.Module = network
        self.states: Mapping[str, nn.Module] = {}

    def update(self, step: int, skipped: torch.Tensor | None) -> None:
        pass


class Ema:
    """Exponential moving average of `model`; it starts as a copy of it.

    Its parameters are the same on all ranks. Its running statistics belong to this rank, as do those of `model`.

    Args:
        model: the unwrapped network, after Accelerate's `prepare`: it has the weights of rank 0, and the autocast that
            Accelerate wraps around `forward`, which the copy also gets.
        decay: of the average, in [0, 1).
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
            # In place, like the line above. Computing and scaling a difference first would allocate memory for all the
            # weights: 250 ms for a ResNet50 on a CPU instead of 20. On a GPU this is one kernel for each tensor.
            weights = [torch.where(skipped, 0.0, weight)] * len(self._averages)
            torch._foreach_lerp_(self._averages, self._live, weights)
        if self._copies:  # torch refuses empty lists
            torch._foreach_copy_(self._copies, self._copied)


def average_of(decay: float, model: nn.Module, prepared: nn.Module) -> Average:
    """Return the average for train.ema_decay; `model` is the unwrapped network of `prepared`."""
    return Ema(model, decay) if decay else NoAverage(prepared)


def decay_at(step: int, decay: float) -> float:
    """Return d(t) after `step` earlier steps."""
    return min(decay, (1 + step) / (10 + step))
