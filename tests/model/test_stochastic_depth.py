"""Stochastic depth, compared with a loop over the images, and what it must not change."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from wasteddp.model.stages import Stages
from wasteddp.model.stochastic_depth import StochasticDepth
from wasteddp.order.keyed_random import DEPTH, uniform

CPU = torch.device("cpu")
SAMPLES = np.array([3, 90, 17, 4, 55, 6])


def small(arch: str = "basic") -> nn.Module:
    """Return a ResNet of torchvision with few blocks; bottlenecks are thin."""
    torch.manual_seed(0)
    if arch == "basic":
        return ResNet(BasicBlock, [1, 2, 1, 1], num_classes=3)
    return ResNet(Bottleneck, [1, 2, 1, 1], num_classes=3, width_per_group=8)


def network(probability: float, arch: str = "basic") -> tuple[nn.Module, StochasticDepth]:
    model = small(arch)
    return model, StochasticDepth(model, probability, seed=7)


def images(num: int = len(SAMPLES)) -> torch.Tensor:
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def plain_forward(model: nn.Module, x: torch.Tensor, probability: float, epoch: int) -> torch.Tensor:
    """Run the network without hooks, block by block; each image's branch is kept or dropped by a random number."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
    for number, block in enumerate(blocks):
        branch = block.bn1(block.conv1(x)).relu()
        branch = block.bn2(block.conv2(branch))
        if hasattr(block, "conv3"):
            branch = block.bn3(block.conv3(branch.relu()))
        dropped = probability * number / (len(blocks) - 1)
        rows = []
        for row, sample in enumerate(SAMPLES):
            draw = uniform(DEPTH, 7, epoch, sample, num=len(blocks))[number]
            rows.append(branch[row] * (0.0 if draw < dropped else 1 / (1 - dropped)))
        x = (torch.stack(rows) + (block.downsample(x) if block.downsample else x)).relu()
    logits: torch.Tensor = model.fc(model.avgpool(x).flatten(1))
    return logits


@pytest.mark.parametrize("arch", ["basic", "bottleneck"])
def test_branches_are_dropped_image_by_image_as_a_plain_loop_drops_them(arch: str) -> None:
    model, depth = network(0.6, arch)
    bare = small(arch)
    for epoch in range(2):
        depth.draw(SAMPLES, epoch, CPU)
        torch.testing.assert_close(model(images()), plain_forward(bare, images(), 0.6, epoch), rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_what_was_kept_only() -> None:
    model, depth = network(0.9)
    depth.draw(np.array([17, 17]), 1, CPU)  # the same sample twice, since BatchNorm needs two
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    gone = [bool((factors == 0).all()) for factors in depth._factors_LB111]
    assert any(gone)
    assert not all(gone)
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
    assert [bool((block.bn2.bias.grad == 0).all()) for block in blocks] == gone


def test_evaluation_names_and_frozen_blocks_are_those_of_a_network_without_it() -> None:
    model, _ = network(0.9)  # evaluation needs no `draw`
    bare = small()
    assert list(model.state_dict()) == list(bare.state_dict())
    assert torch.equal(model.eval()(images()), bare.eval()(images()))
    for network_ in (model, bare):
        Stages(network_).train_mode("backbone")
    assert torch.equal(model(images()), bare(images()))


def test_draws_are_of_the_sample_and_the_epoch_not_of_its_place() -> None:
    _, depth = network(0.5)

    def drawn(samples: list[int], epoch: int = 3) -> torch.Tensor:
        depth.draw(np.array(samples), epoch, CPU)
        return torch.stack(depth._factors_LB111)[:, :, 0, 0, 0].T

    whole = drawn([5, 8, 1, 9])
    assert torch.equal(torch.cat([drawn([5, 8]), drawn([1, 9])]), whole)  # two ranks
    assert torch.equal(drawn([9, 1, 8, 5]), whole.flip(0))
    assert not torch.equal(drawn([5, 8, 1, 9], epoch=4), whole)


def test_each_block_is_skipped_as_often_as_the_linear_rule_and_the_mean_stays() -> None:
    _, depth = network(0.4)
    depth.draw(np.arange(20_000), 0, CPU)
    factors_LB = torch.stack(depth._factors_LB111)[:, :, 0, 0, 0]
    expected = [0.4 * number / 4 for number in range(5)]
    assert (factors_LB == 0).float().mean(1).tolist() == pytest.approx(expected, abs=0.012)
    assert factors_LB.mean(1).tolist() == pytest.approx([1.0] * 5, abs=0.02)


def test_a_copy_of_the_network_evaluates() -> None:
    """The average of the weights is such a copy."""
    model, depth = network(0.5)
    depth.draw(SAMPLES, 0, CPU)
    model(images())
    copy = deepcopy(model).eval()
    assert torch.equal(copy(images()), model.eval()(images()))
