"""LARS and LAMB, for global batches of thousands: each layer's step is proportional to the norm of its weights.

They do not synchronize with the device: norms, ratios and step counts stay there. Like torch's fused optimizers they
read `found_inf` (set by GradScaler or `divergence.Guard`): if it is 1, a step changes neither weights nor state.

Legend: N parameters of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf, log
from typing import Any

import torch

_LARS_TRUST = 0.001  # eta, as in timm
_LAMB_EPSILON = 1e-6  # as in timm

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]


class _LayerWise(torch.optim.Optimizer):
    """The common part. A group with `adapts` False (biases and norms) uses the ratio 1."""

    _step_supports_amp_scaling = True  # GradScaler then sets `grad_scale` and `found_inf` without reading them

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run one step. It reads two attributes of the optimizer, tensors [] on the device, if they are set:
        `grad_scale`, the factor of the gradients, and `found_inf`, 1 to skip the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        applies = None if found_inf is None else found_inf == 0
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            if scale is not None:
                torch._foreach_div_(gradients, scale)
            if applies is not None:  # NaN times 0 would be NaN
                gradients = [torch.where(applies, gradient, 0) for gradient in gradients]
            directions = self._directions(group, weights, gradients, applies)
            torch._foreach_add_(weights, torch._foreach_mul(directions, _where(applies, -group["lr"], 0.0)))
        return loss

    def _directions(
        self, group: dict[str, Any], weights: Tensors, gradients: Tensors, applies: torch.Tensor | None
    ) -> Tensors:
        """Update the state, and return what to subtract from the weights, before the learning rate.

        Args:
            gradients: zeros if the step is skipped.
            applies: bool [], false if the step is skipped; None: it is never skipped.
        """
        raise NotImplementedError

    def _states(self, weights: Tensors, key: str) -> list[torch.Tensor]:
        for weight in weights:
            if key not in self.state[weight]:
                self.state[weight][key] = torch.zeros_like(weight)
        return [self.state[weight][key] for weight in weights]


class LARS(_LayerWise):
    """SGD with momentum m that scales the gradient g of each layer, with weights w and decay b, to a fraction of |w|:

        v = m v + eta |w| / (|g| + b |w|) (g + b w)        w = w - lr v        ratio 1 if |w| or |g| is 0

    The learning rate is outside the momentum, as in torch's SGD and timm's LARS. In the paper it is inside, where a
    change of the rate needs the correction of Goyal et al. 2017, section 3.
    Source: You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks", eq. 6 and algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = _LARS_TRUST,
        adapts: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapts": adapts}
        super().__init__(params, defaults)

    def _directions(
        self, group: dict[str, Any], weights: Tensors, gradients: Tensors, applies: torch.Tensor | None
    ) -> Tensors:
        decay, momenta = group["weight_decay"], self._states(weights, "momentum_buffer")
        steps = torch._foreach_add(gradients, weights, alpha=decay)
        if group["adapts"]:
            sizes_N, slopes_N = _norms(weights), _norms(gradients)
            ratios_N = group["trust"] * sizes_N / (slopes_N + decay * sizes_N)
            torch._foreach_mul_(steps, _each(torch.where((sizes_N > 0) & (slopes_N > 0), ratios_N, 1.0)))
        if applies is not None:
            torch._foreach_mul_(steps, applies.float())  # removes the decay of a skipped step
        torch._foreach_mul_(momenta, _where(applies, group["momentum"], 1.0))
        torch._foreach_add_(momenta, steps)
        return momenta


class LAMB(_LayerWise):
    """Adam that scales the step u of each layer, with weights w and decay b, to |w|; t counts the steps, from 1:

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + b w        w = w - lr |w| / |u| u    ratio 1 if one is 0

    It has the bias correction of the paper's algorithm 2, as timm's LAMB, and phi(z) = z. Unlike timm's, it does not
    clip the gradient to norm 1: that is optimizer.clip_norm here.
    Source: You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = _LAMB_EPSILON,
        adapts: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps, "adapts": adapts})

    def _directions(
        self, group: dict[str, Any], weights: Tensors, gradients: Tensors, applies: torch.Tensor | None
    ) -> Tensors:
        beta1, beta2 = group["betas"]
        means, squares = self._states(weights, "exp_avg"), self._states(weights, "exp_avg_sq")
        torch._foreach_mul_(means, _where(applies, beta1, 1.0))
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, _where(applies, beta2, 1.0))
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        done_N = torch.stack(self._count(weights, applies)).clamp_(min=1)  # 0 if all steps so far were skipped
        steps = torch._foreach_div(means, _each(_one_minus_power(beta1, done_N)))
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, _each(_one_minus_power(beta2, done_N).sqrt()))
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(steps, roots)
        torch._foreach_add_(steps, weights, alpha=group["weight_decay"])
        if group["adapts"]:
            sizes_N, lengths_N = _norms(weights), _norms(steps)
            ratios_N = torch.where((sizes_N > 0) & (lengths_N > 0), sizes_N / lengths_N, 1.0)
            torch._foreach_mul_(steps, _each(ratios_N))
        return steps

    def _count(self, weights: Tensors, applies: torch.Tensor | None) -> list[torch.Tensor]:
        """Count this step for each weight, and return the counts: they are lower in a stage that was frozen."""
        for weight in weights:  # not named "step", which torch keeps on the CPU when it loads a state
            self.state[weight].setdefault("num_steps", torch.zeros((), device=weight.device))
        counts = [self.state[weight]["num_steps"] for weight in weights]
        if applies is None:
            torch._foreach_add_(counts, 1.0)
        else:  # without alpha, torch reads a tensor [] as a Python number, which synchronizes with the device
            torch._foreach_add_(counts, applies.float(), alpha=1)
        return counts


def _where(applies: torch.Tensor | None, value: float, skipped: float) -> Any:
    """Return `value`, or `skipped` if the step is skipped: a number, or a tensor [] on the device."""
    return value if applies is None else torch.where(applies, value, skipped)


def _norms(tensors: Tensors) -> torch.Tensor:
    """Return the norm of each tensor, [N]."""
    return torch.stack(list(torch._foreach_norm(tensors)))


def _each(values_N: torch.Tensor) -> list[torch.Tensor]:
    return list(values_N.unbind())


def _one_minus_power(beta: float, done_N: torch.Tensor) -> torch.Tensor:
    """Return 1 - beta^t without cancellation: in float32, 1 - 0.999 has only five correct digits."""
    return -torch.expm1(done_N * (log(beta) if beta else -inf))
