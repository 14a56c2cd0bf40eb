"""What torch.compile, SyncBatchNorm and DDP's static graph do to a network, and what they do not support."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from wasteddp import settings
from wasteddp.errors import SettingsError
from wasteddp.model import networks
from wasteddp.model.stages import Stages
from wasteddp.model.stochastic_depth import StochasticDepth
from wasteddp.training.build_model import place
from wasteddp.training.distributed.startup import refuse_impossible

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Real tracing with guards, but without code generation, which takes minutes: a list of the graphs."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        made.append(len(made))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 8)
    yield made
    torch._dynamo.reset()


def test_a_compiled_network_is_one_graph_and_keeps_names_hooks_and_answers(graphs: list[int]) -> None:
    plain, compiled = network(), network()
    made = place(compiled, settings.parse("").model, device=CPU, world_size=1, compiles=True)
    place(plain, settings.parse("").model, device=CPU, world_size=1, compiles=False)
    assert made is compiled
    assert list(made.state_dict()) == list(plain.state_dict())
    depths = [StochasticDepth(model, 0.5, seed=0) for model in (plain, made)]  # hooks after it, before the first call
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = images.contiguous(memory_format=torch.channels_last)
    for epoch in range(3):
        for depth in depths:
            depth.draw(np.arange(4), epoch, CPU)
        assert torch.equal(plain(images), made(images)), "other draws"
    assert len(graphs) == 1
    for model in (plain, made):
        Stages(model).train_mode("layer3")
    assert torch.equal(plain(images), made(images)), "another graph, since other layers use their statistics"
    assert len(graphs) == 2
    assert torch._dynamo.config.cache_size_limit == 64


def test_batchnorm_over_the_ranks_keeps_weights_and_names_and_is_made_for_several_only() -> None:
    parsed = settings.parse("model: {sync_batchnorm: true}").model
    model, alone = network(), network()
    parameters = dict(model.named_parameters())
    several = place(model, parsed, device=CPU, world_size=2, compiles=False)
    assert list(several.state_dict()) == list(alone.state_dict())
    assert all(parameters[name] is parameter for name, parameter in several.named_parameters())
    assert isinstance(several.layer1[0].bn2, nn.SyncBatchNorm)
    assert isinstance(several.bn1, nn.SyncBatchNorm)
    assert len(networks.running_statistics(several)) == len(networks.running_statistics(alone))
    alone = place(alone, parsed, device=CPU, world_size=1, compiles=False)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in alone.modules())


def test_batchnorm_over_ranks_without_a_gpu_is_refused_because_torch_does(tmp_path: Path) -> None:
    parsed = settings.parse("model: {sync_batchnorm: true}")
    refuse_impossible(parsed.model, parsed.ddp, parsed.train, 1, 1, has_gpu=False)
    refuse_impossible(parsed.model, parsed.ddp, parsed.train, 2, 1, has_gpu=True)
    with pytest.raises(SettingsError, match="sync_batchnorm is set and the 2 processes have no GPU"):
        refuse_impossible(parsed.model, parsed.ddp, parsed.train, 2, 1, has_gpu=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            nn.SyncBatchNorm(2)(torch.randn(3, 2))
    finally:
        dist.destroy_process_group()


def test_a_static_graph_with_accumulation_is_refused_with_the_size_that_fits() -> None:
    parsed = settings.parse("ddp: {static_graph: true}\ntrain: {batch_size: 256, max_micro_batch: 32}")
    refuse_impossible(parsed.model, parsed.ddp, parsed.train, 8, 1, has_gpu=True)
    refuse_impossible(parsed.model, parsed.ddp, parsed.train, 1, 8, has_gpu=True)  # without DDP
    with pytest.raises(
        SettingsError, match=r"a step has 4 micro-batches(.|\n)*set train.max_micro_batch to 128 or more"
    ):
        refuse_impossible(parsed.model, parsed.ddp, parsed.train, 2, 4, has_gpu=True)
