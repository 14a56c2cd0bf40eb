"""LARS and LAMB, for global batches of thousands: each layer's step is in proportion to the norm of its weights.

Neither waits for the device: norms, ratios and numbers of steps stay there. They take what torch asks of fused
optimizers: where `found_inf` (set by GradScaler or by divergence.Guard) is 1, a step changes neither weights nor state.

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
    """What both have in common. A group with `adapts` False, of biases and norms, takes steps of ratio 1."""

    _step_supports_amp_scaling = True  # GradScaler then gives `grad_scale` and `found_inf`, and does not look at them

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. As attributes of the optimizer, where they are: `grad_scale`, by which the gradients are still
        multiplied, and `found_inf`; both tensors [] on the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        goes = None if found_inf is None else found_inf == 0
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            if scale is not None:
                torch._foreach_div_(gradients, scale)
            if goes is not None:  # NaN times 0 would be NaN
                gradients = [torch.where(goes, gradient, 0) for gradient in gradients]
            directions = self._directions(group, weights, gradients, goes)
            torch._foreach_add_(weights, torch._foreach_mul(directions, _where(goes, -group["lr"], 0.0)))
        return loss

    def _directions(
        self, group: dict[str, Any], weights: Tensors, gradients: Tensors, goes: torch.Tensor | None
    ) -> Tensors:
        """What is to be subtracted from the weights, times the learning rate. Updates the state.

        Args:
            gradients: zeros where the step is skipped.
            goes: bool []: whether it is not; None: surely not.
        """
        raise NotImplementedError

    def _states(self, weights: Tensors, key: str) -> list[torch.Tensor]:
        for weight in weights:
            if key not in self.state[weight]:
                self.state[weight][key] = torch.zeros_like(weight)
        return [self.state[weight][key] for weight in weights]


class LARS(_LayerWise):
    """SGD with momentum m, whose gradient g of each layer with weights w and decay b is made as large as a part of w:

        v = m v + eta |w| / (|g| + b |w|) (g + b w)        w = w - lr v        ratio 1 where |w| or |g| is 0

    The learning rate is outside of the momentum, as in torch's SGD and timm's LARS: in the paper it is inside, and a
    change of the rate would need the correction of Goyal et al. 2017, section 3.
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
        self, group: dict[str, Any], weights: Tensors, gradients: Tensors, goes: torch.Tensor | None
    ) -> Tensors:
        decay, momenta = group["weight_decay"], self._states(weights, "momentum_buffer")
        steps = torch._foreach_add(gradients, weights, alpha=decay)
        if group["adapts"]:
            sizes_N, slopes_N = _norms(weights), _norms(gradients)
            ratios_N = group["trust"] * sizes_N / (slopes_N + decay * sizes_N)
            torch._foreach_mul_(steps, _each(torch.where((sizes_N > 0) & (slopes_N > 0), ratios_N, 1.0)))
        if goes is not None:
            torch._foreach_mul_(steps, goes.float())  # the decay's part
        torch._foreach_mul_(momenta, _where(goes, group["momentum"], 1.0))
        torch._foreach_add_(momenta, steps)
        return momenta


class LAMB(_LayerWise):
    """Adam whose step u of each layer with weights w is made as large as w, with decay b, t steps done, this one too:

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + b w        w = w - lr |w| / |u| u    1 where either is 0

    With the bias correction of the paper's algorithm 2, which timm takes too, phi(z) = z, and without timm's clipping
    of the gradient to norm 1, which is optimizer.clip_norm here.
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
        self, group: dict[str, Any], weights: Tensors, gradients: Tensors, goes: torch.Tensor | None
    ) -> Tensors:
        beta1, beta2 = group["betas"]
        means, squares = self._states(weights, "exp_avg"), self._states(weights, "exp_avg_sq")
        torch._foreach_mul_(means, _where(goes, beta1, 1.0))
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, _where(goes, beta2, 1.0))
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        done_N = torch.stack(self._count(weights, goes)).clamp_(min=1)  # 0 after skipped steps only
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

    def _count(self, weights: Tensors, goes: torch.Tensor | None) -> list[torch.Tensor]:
        """Steps done, this one included, of each weight: those of a stage that was frozen are fewer."""
        for weight in weights:  # by another name than Adam's "step", which torch leaves on the CPU when it is loaded
            self.state[weight].setdefault("num_steps", torch.zeros((), device=weight.device))
        counts = [self.state[weight]["num_steps"] for weight in weights]
        if goes is None:
            torch._foreach_add_(counts, 1.0)
        else:  # without alpha, torch takes a tensor [] for a number of the host, and waits for the device to read it
            torch._foreach_add_(counts, goes.float(), alpha=1)
        return counts


def _where(goes: torch.Tensor | None, value: float, skipped: float) -> Any:
    """`value`, or `skipped` where the step is skipped: a number, or a tensor [] on the device."""
    return value if goes is None else torch.where(goes, value, skipped)


def _norms(tensors: Tensors) -> torch.Tensor:
    """[N]"""
    return torch.stack(list(torch._foreach_norm(tensors)))


def _each(values_N: torch.Tensor) -> list[torch.Tensor]:
    return list(values_N.unbind())


def _one_minus_power(beta: float, done_N: torch.Tensor) -> torch.Tensor:
    """1 - beta^t without the digits that float32 loses: 0.001 is 1 - 0.999 to five of them."""
    return -torch.expm1(done_N * (log(beta) if beta else -inf))
