"""Networks by name, with a fresh head for the classes of a shard set: torchvision's classifiers, and timm's.

    resnet50, mobilenet_v3_small, convnext_tiny, ...     a name in `torchvision.models.list_models`
    timm/tf_efficientnet_lite0                           a name in `timm.list_models`

The head is the last layer, one linear layer. Dropout and the libraries' own stochastic depth are switched off: their
random numbers depend on the place of an image in its batch, so a run would depend on its number of ranks. The setting
model.stochastic_depth has the same effect and depends on the sample only. `running_statistics` lists those of a
network's BatchNorms.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import MaxVit, VisionTransformer
from torchvision.ops import StochasticDepth

from wasteddp.errors import SettingsError

TIMM = "timm/"
_OUTPUTS = "it returns the outputs of further classifiers in training"
_REFUSED = {
    "googlenet": _OUTPUTS,
    "inception": _OUTPUTS,
    "mnasnet": "it loads only files that torch.save wrote, and a checkpoint is not one",
    "squeezenet": "its last layer is a convolution, and the head must be a linear layer",
}


def architectures() -> list[str]:
    """Return torchvision's names that `build` accepts."""
    names = torchvision.models.list_models(module=torchvision.models)  # without detection, segmentation, video
    return [name for name in names if not name.startswith(tuple(_REFUSED))]


def build(arch: str, num_classes: int, *, zero_init: bool = True) -> nn.Module:
    """Return a network with random weights and a linear head.

    Args:
        arch: its name in torchvision, or "timm/" and its name in timm.
        num_classes: outputs of the head.
        zero_init: of a ResNet of torchvision, initialise the last BatchNorm of each block to zero, so that each block
            starts as the identity. Without it, the first epochs from random weights are unstable at useful learning
            rates (Source: Goyal et al. 2017, section 5.1).

    Raises:
        SettingsError: there is no such network, it cannot be trained here, or timm is not installed.
    """
    if is_resnet(arch):
        resnet: nn.Module = torchvision.models.get_model(
            arch, weights=None, num_classes=num_classes, zero_init_residual=zero_init
        )
        return resnet
    model = _from_timm(arch, num_classes) if arch.startswith(TIMM) else _from_torchvision(arch, num_classes)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | StochasticDepth):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):  # timm's DropPath
            module.drop_prob = 0.0  # type: ignore[assignment]
    head = model.get_submodule(head_name(model))
    assert isinstance(head, nn.Linear)
    head.reset_parameters()  # as a ResNet's: those of EfficientNets start with a loss of 5 instead of log(6) = 1.8
    return model


def build_shapes(arch: str, num_classes: int) -> nn.Module:
    """Return a network whose parameters have shapes and no values, to which `load_state_dict(assign=True)` gives them.

    It takes no random numbers, and no time for them. A network of timm has values, since some compute with them while
    they are built.

    Raises:
        SettingsError: see `build`.
    """
    if is_resnet(arch):
        with torch.device("meta"):
            return build(arch, num_classes)
    with torch.random.fork_rng(devices=[]):  # a transformer draws its position embeddings
        if arch.startswith(TIMM):
            return build(arch, num_classes)
        with _parameters_on_meta():  # buffers that no file holds, such as Swin's indices, need their values
            return build(arch, num_classes)


def head_name(model: nn.Module) -> str:
    """Return the name of the head, such as "fc" or "classifier.3"."""
    if card := getattr(model, "pretrained_cfg", None):  # timm
        return str(card["classifier"])
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else ""


@lru_cache
def head_of(arch: str) -> str:
    """Return `head_name` of an architecture.

    Raises:
        SettingsError: see `build`.
    """
    return "fc" if is_resnet(arch) else head_name(build_shapes(arch, 2))


def refuse_sizes(model: nn.Module, arch: str, sizes_px: Iterable[int]) -> None:
    """Refuse image sizes that a network cannot take, after a forward pass of one image each. ResNets take any.

    Raises:
        SettingsError: a pass fails.
    """
    if is_resnet(arch):
        return
    trains = model.training
    model.eval()
    for side in sorted(set(sizes_px)):
        try:
            with torch.inference_mode():
                model(torch.zeros(1, 3, side, side))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise SettingsError(
                f"{arch} cannot take images of {side} px: {(str(error).splitlines() or ['no reason given'])[0]}",
                "the first step or the first evaluation would fail",
                f"set data.image_size, data.eval_size and schedule.start_size to sizes that it takes"
                f"{_fixed_size(model)}, or use another model.arch",
            ) from error
    model.train(trains)


def is_resnet(arch: str) -> bool:
    """Return whether it is a ResNet, ResNeXt or wide ResNet of torchvision."""
    return arch.startswith(("resnet", "resnext", "wide_resnet")) and arch in architectures()


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """Return BatchNorm's running means and variances, which each rank computes from its own micro-batches."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[torch.Tensor], names: Collection[str]) -> None:
    """Recompute BatchNorm's running statistics as the mean of the batches' statistics.

    It is for weights that no training step produced, such as a mean of several. Source: Izmailov et al. 2018,
    "Averaging Weights Leads to Wider Optima and Better Generalization", section 3.2.

    Args:
        model: set to eval mode.
        batches: normalised images [B, 3, S, S], all of one size B: each batch has the same weight.
        names: names of the BatchNorms to recompute; the others are unchanged.
    """
    model.eval()
    norms = [module for name, module in model.named_modules() if name in names and isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: the cumulative mean
        norm.train()
    for images_BCHW in batches:
        model(images_BCHW)
    model.eval()


def _from_torchvision(arch: str, num_classes: int) -> nn.Module:
    known = architectures()
    if arch not in known:
        why = next((f": {reason}" for name, reason in _REFUSED.items() if arch.startswith(name)), "")
        similar = difflib.get_close_matches(arch, known, n=8, cutoff=0.4) or ["resnet50", "convnext_tiny"]
        raise SettingsError(
            f"model.arch {arch!r} is not a classifier of torchvision {torchvision.__version__} that can be trained"
            f"{why}",
            "there would be no network to train",
            f"set model.arch to one of the {len(known)} networks in docs/networks.md, such as {', '.join(similar)}; or "
            f"to {TIMM}NAME for a network of timm",
        )
    builder = torchvision.models.get_model_builder(arch)
    how = {}
    if builder.__name__.startswith("vit_"):  # its number of position embeddings is that of its published weights
        how["image_size"] = torchvision.models.get_model_weights(arch).DEFAULT.meta["min_size"][0]
    model: nn.Module = builder(weights=None, num_classes=num_classes, **how)
    assert isinstance(model, VisionTransformer) == bool(how)
    return model


def _from_timm(arch: str, num_classes: int) -> nn.Module:
    timm, name = _timm(), arch.removeprefix(TIMM)
    if name not in timm.list_models():
        similar = difflib.get_close_matches(name, timm.list_models(), n=8, cutoff=0.4)
        raise SettingsError(
            f"model.arch {arch!r} is not a network of timm {timm.__version__}",
            "there would be no network to train",
            f"use a name of timm.list_models(){', such as ' if similar else ''}{', '.join(similar)}",
        )
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes)
    head = getattr(model, "pretrained_cfg", {}).get("classifier")
    modules = dict(model.named_modules())
    if not isinstance(head, str) or not isinstance(modules.get(head), nn.Linear):
        raise SettingsError(
            f"the head of {arch} is {head!r}, and not one linear layer",
            "freezing, fresh heads and the features of images would not be defined",
            "use another network of timm",
        )
    return model


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise SettingsError(
            f"model.arch begins with {TIMM}, and timm cannot be imported: {error}",
            "there would be no network",
            "pip install 'wasteddp[timm]', or set model.arch to a network of torchvision",
        ) from error
    module: ModuleType = timm
    return module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build networks without values for their parameters. torch.device("meta") would leave the buffers without, too,
    and RegNet computes its widths with tensors."""
    register = nn.Module.register_parameter

    def register_shape(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        shape = None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, shape)

    nn.Module.register_parameter = register_shape  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _fixed_size(model: nn.Module) -> str:
    side = getattr(model, "image_size", None) or (224 if isinstance(model, MaxVit) else 0)
    card = getattr(model, "pretrained_cfg", None) or {}
    return f", such as {side or card['input_size'][-1]}" if side or "input_size" in card else ""
