"""The families of networks beside the ResNets: stages, fresh heads, frozen stages, bundles, and what does not apply."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from small_run import CARD
from torch import nn
from torch.nn import functional
from torchvision.models import convnext, efficientnet, swin_transformer, vision_transformer
from trainings import config_of, final_weights, rows

from wasteddp import cli, settings, train
from wasteddp.errors import SettingsError, WeightsError
from wasteddp.inference.bundle import save_bundle
from wasteddp.inference.classifier import Classifier, load_network
from wasteddp.model import networks, pretrained
from wasteddp.model.networks import running_statistics
from wasteddp.model.stages import STAGES, Stages, stage_starts
from wasteddp.model.stochastic_depth import StochasticDepth, branch_ends
from wasteddp.training import build_model
from wasteddp.training.distributed import precision

NEEDS_TIMM = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed")
# name, a parameter that `freeze: layer1` holds, one of layer2 that it does not
FAMILIES = [
    pytest.param("regnet_x_400mf", "trunk_output.block1", "trunk_output.block2", id="regnet"),
    pytest.param("convnext_tiny", "features.1.0.layer_scale", "features.2", id="convnext"),
    pytest.param("swin_t", "features.1", "features.2", id="swin"),
    pytest.param("swin_v2_t", "features.1", "features.2", id="swin_v2"),
    pytest.param("vit_b_32", "class_token", "encoder.layers.encoder_layer_3", id="vit"),
    pytest.param("shufflenet_v2_x0_5", "stage2", "stage3", id="shufflenet"),
    pytest.param("efficientnet_b0", "features.2", "features.3", id="efficientnet"),
    pytest.param("mobilenet_v3_small", "features.1", "features.2", id="mobilenet_v3"),
    pytest.param("timm/tf_efficientnet_lite0", "blocks.1", "blocks.2", id="timm", marks=NEEDS_TIMM),
]
SIDE = 64  # px
SIDES = {"vit_b_32": 224}
WHOLE = [
    "densenet121", "efficientnet_v2_s", "maxvit_t", "mobilenet_v2", "mobilenet_v3_large", "regnet_y_800mf", "vit_h_14",
    "wide_resnet50_2", pytest.param("timm/vit_tiny_patch16_224", marks=NEEDS_TIMM),
    pytest.param("timm/convnext_atto", marks=NEEDS_TIMM), pytest.param("timm/resnet18", marks=NEEDS_TIMM),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    """EfficientNet, ConvNeXt, Swin and ViT with few or thin layers: two million weights or fewer instead of 5 to 86."""

    def thin(function: Any, **dims: Any) -> Any:
        return lambda *args, **how: function(*args, **{**how, **dims})

    def thin_convnext(blocks: list[Any], *rest: Any, **how: Any) -> Any:
        for block in blocks:
            block.input_channels //= 8
            block.out_channels = block.out_channels and block.out_channels // 8
        return real_convnext(blocks, *rest, **how)

    real_convnext, real_blocks = convnext._convnext, efficientnet._efficientnet_conf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convnext, "_convnext", thin_convnext)
        patch.setattr(
            efficientnet, "_efficientnet_conf", lambda arch, **_: real_blocks(arch, width_mult=0.3, depth_mult=0.4)
        )
        vit = thin(vision_transformer._vision_transformer, hidden_dim=24, mlp_dim=48, num_heads=3)
        patch.setattr(vision_transformer, "_vision_transformer", vit)
        swin = thin(swin_transformer._swin_transformer, embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4])
        patch.setattr(swin_transformer, "_swin_transformer", swin)
        yield


def images(arch: str) -> torch.Tensor:
    side = SIDES.get(arch, SIDE)
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))


def numbers(model: nn.Module) -> list[int]:
    """Return the number of the stage of each parameter, in their order; 5 for the head."""
    stages = Stages(model)
    return [len(STAGES) - stages.distance_from_head(name) for name, _ in model.named_parameters()]


@pytest.mark.parametrize("arch", [*WHOLE, *(family.values[0] for family in FAMILIES if not family.marks)])
def test_stages_part_all_parameters_in_the_order_of_the_forward_pass(arch: str) -> None:
    model = networks.build_shapes(str(arch), 3)
    found = numbers(model)
    assert found == sorted(found)
    assert set(found) == set(range(6))
    stages = Stages(model)
    assert [len(stages.parameters(upto)) for upto in STAGES] == [sum(n <= i for n in found) for i in range(5)]
    frozen = {id(p) for module in stages.modules("backbone") for p in module.parameters()}
    direct = {id(p) for name, p in model.named_parameters() if "." not in name}  # of no module but the network
    assert frozen | direct == {id(p) for p in stages.parameters("backbone")}


@pytest.mark.parametrize(("arch", "inside", "outside"), FAMILIES)
def test_a_family_trains_freezes_takes_weights_and_comes_back_from_a_bundle(
    arch: str, inside: str, outside: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, source = networks.build(arch, 3), networks.build(arch, 10)
    stages, head = Stages(model), networks.head_name(model)
    assert sorted(set(numbers(model))) == list(range(6))
    assert model.get_submodule(head).weight.shape[0] == 3  # type: ignore[union-attr, index]
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    fresh = {name: t.clone() for name, t in model.state_dict().items() if stages.is_head(name)}
    pretrained.initialise(model, arch, str(tmp_path / "w.safetensors"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name] if stages.is_head(name) else source.state_dict()[name]), name

    stages.freeze("layer1")
    stages.train_mode("layer1")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = images(arch).contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    nn.init.normal_(model.get_parameter(f"{head}.weight"))  # ViT's starts at zero: the backbone would not move
    functional.cross_entropy(model(batch), torch.tensor([0, 2, 1, 1])).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert [name for name in before if f"{name}.".startswith(f"{inside}.")]
    assert not [name for name in moved if f"{name}.".startswith(f"{inside}.")]
    assert [name for name in moved if name.startswith(f"{outside}.")]
    assert f"{head}.weight" in moved

    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    side = SIDES.get(arch, SIDE)
    preprocessing = replace(CARD.preprocessing, image_size_px=side, resize_px=side)
    save_bundle(tmp_path / "model", replace(CARD, arch=arch, preprocessing=preprocessing), state)
    card, again = load_network(tmp_path / "model")
    with torch.no_grad():
        again.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(again(batch), model.eval()(batch))
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert card.arch == arch
    views = [np.zeros((side, side, 3), np.uint8)]
    _, features_BD = Classifier.load(tmp_path / "model", batch_size=2).probabilities_and_features(views)
    assert features_BD.shape == (1, model.get_submodule(head).in_features)


def test_dropout_is_off_so_that_two_passes_are_equal() -> None:
    model = networks.build("efficientnet_b0", 3)
    model.train()
    assert torch.equal(model(images("efficientnet_b0")), model(images("efficientnet_b0")))


@pytest.mark.parametrize("arch", ["efficientnet_b0", "convnext_tiny", "swin_t"])
def test_stochastic_depth_skips_whole_branches_of_the_images_drawn(arch: str) -> None:
    """With every branch but the first skipped, an image's output depends on the rest only; the other image's does not
    change."""
    model = networks.build(arch, 3)
    depth = StochasticDepth(model, 0.9, seed=1)
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: nn.Module, given: tuple[torch.Tensor], found: torch.Tensor) -> None:
        calls.append((given[0].clone(), found.clone()))

    for branch in branch_ends(model)[1:]:
        branch.register_forward_hook(keep)
    depth._factors_LB111 = torch.tensor([[1.0, 1.0]] + [[0.0, 10.0]] * (len(branch_ends(model)) - 1))[
        :, :, None, None, None
    ].unbind()
    model.train()(torch.randn(2, 3, SIDE, SIDE))
    assert calls
    for given, found in calls:
        assert not found[0].any()
        assert torch.equal(found[1], 10 * given[1])
        assert given[0].any(), "the branch itself is unchanged"


NOT_APPLICABLE = [
    ("alexnet", "model: {freeze: layer2}", "alexnet has no stages, and model.freeze is layer2"),
    ("alexnet", "optimizer: {layer_decay: 0.5}", "no stages, and optimizer.layer_decay is 0.5"),
    ("mobilenet_v3_small", "model: {stochastic_depth: 0.1}", "no residual blocks that an image can skip"),
    ("convnext_tiny", "model: {sync_batchnorm: true}", "has no BatchNorm"),
    ("vit_b_32", "data: {image_size: 96}", r"vit_b_32 cannot take images of 96 px: .*(.|\n)*such as 224"),
    ("vit_b_32", "data: {image_size: 224, eval_size: 256}", "cannot take images of 256 px"),
    ("alexnet", "data: {image_size: 32}", "alexnet cannot take images of 32 px"),
    pytest.param(
        "timm/vit_tiny_patch16_224", "data: {image_size: 96}", r"images of 96 px: (.|\n)*such as 224", marks=NEEDS_TIMM
    ),
]


@pytest.mark.parametrize(("arch", "text", "message"), NOT_APPLICABLE)
def test_what_does_not_apply_is_refused_by_name(
    arch: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.init, "normal_", lambda tensor, *_, **__: tensor)
    asked = settings.parse(text)
    changed = asked.model.model_copy(update={"arch": arch, "weights": "none"})
    with pytest.raises(SettingsError, match=message):
        build_model.make_initial(asked.model_copy(update={"model": changed}), ("a", "b"))


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("inception_v3", "outputs of further classifiers"),
        ("googlenet", "outputs of further classifiers"),
        ("squeezenet1_0", "last layer is a convolution"),
        ("mnasnet1_0", "only files that torch.save wrote"),
        ("mobilenet_v3", "mobilenet_v3_small"),
        pytest.param("timm/tf_efficientnet_lite", "timm.list_models.*such as tf_efficientnet_lite", marks=NEEDS_TIMM),
        pytest.param("timm/deit_tiny_distilled_patch16_224", "not one linear layer", marks=NEEDS_TIMM),
    ],
)
def test_other_networks_are_refused_with_a_reason(arch: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        networks.build(arch, 3)


def test_without_timm_its_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SettingsError, match=r"pip install 'wasteddp\[timm\]'"):
        networks.build("timm/resnet18", 3)


def test_imagenet_weights_that_expect_other_numbers_or_come_from_a_hub_are_refused() -> None:
    for arch, message in (("efficientnet_v2_l", r"set model.mean to \[0.5, 0.5, 0.5\]"), ("timm/resnet18", "a hub")):
        with pytest.raises(WeightsError, match=message):
            pretrained.refuse_imagenet_weights(settings.Model(arch=arch))
    half = (0.5, 0.5, 0.5)
    pretrained.refuse_imagenet_weights(settings.Model(arch="efficientnet_v2_l", mean=half, std=half))
    pretrained.refuse_imagenet_weights(settings.Model(arch="convnext_tiny"))


def test_the_imagenet_weights_of_each_network_have_a_hash_in_their_name() -> None:
    """`pretrained._refuse_other_content` compares it with the file."""
    for arch in networks.architectures():
        name = torchvision.models.get_model_weights(arch).DEFAULT.url.rpartition("/")[2]
        digits = name.removesuffix(".pth").rpartition("-")[2]
        assert len(digits) >= 8, name
        assert int(digits, 16) >= 0


def test_older_names_in_published_files_are_renamed() -> None:
    source = {name: t.clone() for name, t in networks.build("densenet121", 3).state_dict().items()}
    old = {}
    for name, tensor in source.items():
        for part in ("norm", "conv"):
            for number in "12":
                if "denselayer" in name:
                    name = name.replace(f".{part}{number}.", f".{part}.{number}.")
        if not name.endswith("num_batches_tracked"):
            old[name] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    model = networks.build("densenet121", 3)
    pretrained.load_backbone(model, "densenet121", pretrained._with_names_of_today(model, "densenet121", old), "a file")
    assert torch.equal(model.features.denseblock4.denselayer2.conv2.weight,  # type: ignore[union-attr, operator]
                       source["features.denseblock4.denselayer2.conv2.weight"])  # fmt: skip
    vit = networks.build("vit_b_32", 3)
    renamed = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for name, tensor in networks.build("vit_b_32", 3).state_dict().items()
    }
    assert any("linear_1" in name for name in renamed)
    pretrained.load_backbone(vit, "vit_b_32", pretrained._with_names_of_today(vit, "vit_b_32", renamed), "a file")
    other = networks.build("vit_b_16", 3).state_dict()
    with pytest.raises(WeightsError, match=r"tensors are missing, unknown"):
        pretrained.load_backbone(vit, "vit_b_32", pretrained._with_names_of_today(vit, "vit_b_32", other), "a file")


RECIPE = (
    "model.arch=efficientnet_b0", "model.freeze=layer2", "model.unfreeze_every_epochs=0.25",
    "model.stochastic_depth=0.3", "model.mean=[0.5,0.5,0.5]", "model.std=[0.25,0.5,0.5]",
    "optimizer.layer_decay=0.7", "optimizer.adaptive_clip=0.1", "train.ema_decay=0.5",
    "train.on_divergence=skip", "train.epochs=1", "checkpoint.keep_last=9",
)  # fmt: skip


def test_a_run_of_another_family_resumes_bit_for_bit_and_predicts(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = config_of(tmp_path, small_shards)
    for setting in RECIPE:
        arguments += ["--set", setting]
    assert train.main(arguments) == 0
    run = tmp_path / "run"
    whole = final_weights(run)
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    assert train.main(arguments) == 0
    assert rows(run)[-1]["attempt"] == 2
    assert final_weights(run) == whole
    card, network = load_network(run)
    assert (card.arch, card.preprocessing.mean, card.preprocessing.std) == (
        "efficientnet_b0",
        (0.5,) * 3,
        (0.25, 0.5, 0.5),
    )
    assert running_statistics(network)
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--split", "val", "--batch-size", "8"]) == 0
    best = next(row for row in rows(run) if row["step"] == card.trained.step and "val/accuracy" in row)
    assert f"{best['val/accuracy']:.1%}".replace("%", "") in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["vit_b_32", pytest.param("timm/swinv2_cr_tiny_ns_224", marks=NEEDS_TIMM)])
def test_a_network_without_values_takes_no_random_numbers_and_the_weights_of_one_with_values(arch: str) -> None:
    """timm's computes with its parameters while it is built."""
    state_dict = networks.build(arch, 3).state_dict()
    before = torch.get_rng_state()
    shapes = networks.build_shapes(arch, 3)
    assert torch.equal(torch.get_rng_state(), before)
    shapes.load_state_dict(state_dict, assign=True)


def test_a_description_of_stages_that_names_no_parameters_is_not_used() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.feature_info = [{"module": f"blocks.{number}", "reduction": 16} for number in range(4)]  # type: ignore[assignment]
    assert stage_starts(model) == ()


def test_a_size_that_a_network_cannot_take_is_refused_before_its_precision_is_measured() -> None:
    model = settings.parse("model: {arch: vit_b_32}").model
    with pytest.raises(SettingsError, match="vit_b_32 cannot take images of 144 px"):
        precision.measure(model, torch.device("cpu"), ["fp32"], image_size=144, max_micro_batch=1)
