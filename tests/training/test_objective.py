"""Losses compared with their formulas in plain Python, gradients with finite differences, parts with the whole."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
import torch
from torch import nn

from wasteddp import settings
from wasteddp.errors import SettingsError
from wasteddp.training import objective

COUNTS = [70, 20, 10]
SHARES = [0.7, 0.2, 0.1]
LABELS = torch.arange(12) % 3


def logits(scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def soft_targets() -> torch.Tensor:
    own = nn.functional.one_hot(LABELS, 3).float()
    return 0.7 * own + 0.3 * own.roll(1, dims=0)


def built(text: str) -> nn.Module:
    return objective.build_loss(settings.parse(f"train: {{{text}}}").train, COUNTS, share_of_classes=SHARES)


def reference(text: str, logits_BK: torch.Tensor, targets: torch.Tensor) -> float:
    """Compute the formulas term by term in Python's floats."""
    train = settings.parse(f"train: {{{text}}}").train
    weights = objective.class_weights(train.class_weighting, COUNTS)
    gamma = train.focal_gamma if train.loss == "focal" else 0.0
    total = 0.0
    for row, target in zip(logits_BK.tolist(), targets.tolist(), strict=True):
        target = target if isinstance(target, list) else [float(k == target) for k in range(3)]
        row = [z + train.logit_adjustment * log(share) for z, share in zip(row, SHARES, strict=True)]
        p = [exp(z) / sum(map(exp, row)) for z in row]
        for k in range(3):
            t = (1 - train.label_smoothing) * target[k] + train.label_smoothing / 3
            weight = 1.0 if weights is None else float(weights[k])
            total -= weight * (1 - p[k]) ** gamma * t * log(p[k])
    return total


@pytest.mark.parametrize("targets", [LABELS, soft_targets()], ids=["labels", "mixed"])
@pytest.mark.parametrize(
    "text",
    [
        "loss: cross_entropy",
        "class_weighting: inverse_frequency, label_smoothing: 0.1",
        "loss: focal",
        "loss: focal, focal_gamma: 0.5, label_smoothing: 0.1, class_weighting: effective_number",
        "loss: focal, focal_gamma: 0, class_weighting: inverse_frequency",
        "logit_adjustment: 1.0",
        "logit_adjustment: 0.3, loss: focal, focal_gamma: 1, label_smoothing: 0.2",
    ],
)
def test_a_loss_is_its_formula_and_its_slope_that_of_finite_differences(text: str, targets: torch.Tensor) -> None:
    loss = built(text)
    assert float(loss(logits(), targets)) == pytest.approx(reference(text, logits(), targets), rel=1e-5)
    exact = logits().double().requires_grad_()
    targets = targets.double() if targets.is_floating_point() else targets
    assert torch.autograd.gradcheck(loss.double(), (exact, targets))


def test_focal_loss_without_gamma_is_cross_entropy_bit_for_bit() -> None:
    for text in ("", "class_weighting: inverse_frequency, label_smoothing: 0.1"):
        for targets in (LABELS, soft_targets()):
            focal = built(f"loss: focal, focal_gamma: 0, {text}")(logits(), targets)
            assert torch.equal(focal, built(text)(logits(), targets))
            weight = torch.tensor(objective.class_weights("inverse_frequency", COUNTS)) if text else None
            own = objective.FocalLoss(0.0, weight_K=weight, label_smoothing=0.1 if text else 0.0)
            assert torch.allclose(own(logits(), targets), focal)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_of_a_certain_answer_has_a_slope(gamma: float) -> None:
    certain = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]], requires_grad=True)
    loss = objective.FocalLoss(gamma, label_smoothing=0.1)(certain, torch.tensor([0, 2]))
    loss.backward()
    assert certain.grad is not None
    assert loss.isfinite()
    assert certain.grad.isfinite().all()
    assert certain.grad[1].abs().sum() > 0.5  # the wrong one still has a gradient


def test_what_is_right_already_counts_less_the_larger_gamma_is() -> None:
    answers = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])  # one right, one wrong
    parts = [
        [float(objective.FocalLoss(gamma)(answers[i : i + 1], torch.tensor([0]))) for i in range(2)]
        for gamma in (0.0, 1.0, 2.0)
    ]
    shares = [right / (right + wrong) for right, wrong in parts]
    assert shares[0] > shares[1] > shares[2]


def test_adjusted_logits_bring_out_the_likelihoods_whatever_the_shares_are() -> None:
    """Samples of one feature from two classes, nine to one. With tau 1 the raw logits of the best linear model predict
    the class with the larger likelihood, as for classes of equal size."""
    drawn = np.random.default_rng(0)
    labels = torch.from_numpy((drawn.random(4000) < 0.1).astype(np.int64))
    feature = torch.from_numpy(drawn.normal(0, 1, 4000)) + 2.0 * labels  # the boundary is at 1
    weights = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    share = float((labels == 0).double().mean())
    train = settings.parse("train: {logit_adjustment: 1}").train
    loss = objective.build_loss(train, [1, 1], share_of_classes=[share, 1 - share])
    inputs = torch.stack([feature, torch.ones_like(feature)], dim=1)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total: torch.Tensor = loss(inputs @ weights.T, labels) / len(labels)
        total.backward()
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    slope, offset = (weights[1] - weights[0]).tolist()
    assert -offset / slope == pytest.approx(1.0, abs=0.1)


def test_class_weights_follow_their_formulas_and_average_to_one() -> None:
    counts = np.array([900, 90, 10])
    assert objective.class_weights("none", counts) is None
    inverse = objective.class_weights("inverse_frequency", counts)
    effective = objective.class_weights("effective_number", counts)
    assert inverse is not None
    assert effective is not None
    assert inverse == pytest.approx(1000 / (3 * counts), rel=1e-6)
    plain = [(1 - 0.999) / (1 - 0.999**n) for n in counts.tolist()]
    assert effective / effective[0] == pytest.approx([r / plain[0] for r in plain], rel=1e-5)
    for weights in (inverse, effective):
        assert (weights * counts).sum() / counts.sum() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "class_weighting: inverse_frequency, label_smoothing: 0.1",
        "loss: focal, class_weighting: inverse_frequency",
        "logit_adjustment: 1.0",
    ],
)
def test_losses_of_micro_batches_add_up_to_the_loss_of_the_whole(text: str) -> None:
    loss = built(text)
    parts = sum(loss(logits()[i : i + 4], LABELS[i : i + 4]) / 12 for i in range(0, 12, 4))
    assert torch.allclose(parts, loss(logits(), LABELS) / 12)


@pytest.mark.parametrize("other", ["train: {logit_adjustment: 0.5,", "data: {balance: 0.5}\ntrain: {"])
def test_what_makes_up_for_imbalance_twice_is_refused(other: str) -> None:
    settings.parse(f"{other} class_weighting: none}}")
    with pytest.raises(SettingsError, match=r"class_weighting inverse_frequency .*twice"):
        settings.parse(f"{other} class_weighting: inverse_frequency}}")
