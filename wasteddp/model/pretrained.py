"""Initial weights: from ImageNet, from a local file, or random if the settings say so; never silently random."""

from __future__ import annotations

import hashlib
import pickle
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load
from torch import nn

from wasteddp.errors import WeightsError, storage
from wasteddp.files import open_regular
from wasteddp.model import networks
from wasteddp.model.networks import TIMM, head_name
from wasteddp.settings import Model

_DOWNLOAD_TIMEOUT_S = 20.0
# "denselayer1.norm.1.weight" in the published files of DenseNet, and "denselayer1.norm1.weight" in the network
_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")


def initialise(model: nn.Module, arch: str, weights: str) -> str:
    """Load the initial weights of the backbone and return their source, for the log; the head stays random.

    Args:
        model: from `networks.build`.
        arch: name of its architecture.
        weights: "imagenet", "none" or a path.

    Raises:
        WeightsError: the weights are not available, or belong to another network.
    """
    if weights == "none":
        return "random weights"
    if weights == "imagenet":
        state, source = _imagenet(arch)
    else:
        state, source = _local(Path(weights)), weights
    load_backbone(model, arch, _with_names_of_today(model, arch, state), source)
    return f"weights from {source}, random head"


def load_backbone(model: nn.Module, arch: str, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load all weights but the head's.

    Args:
        model: from `networks.build`.
        arch: its name, for the message.
        state: tensors by their names in torchvision.
        source: where they come from, for the message.

    Raises:
        WeightsError: the weights are those of another network.
    """
    head = f"{head_name(model)}."
    backbone = {key: value for key, value in state.items() if not key.startswith(head)}
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(head)}
    wrong = sorted(
        key for key in wanted.keys() | backbone.keys()
        if key not in wanted or key not in backbone or wanted[key].shape != backbone[key].shape
    )  # fmt: skip
    if wrong:
        raise WeightsError(
            f"{source}: {len(wrong)} of {len(wanted)} tensors are missing, unknown or have a different shape than in "
            f"{arch}; the first is {wrong[0]!r}",
            "the network would start from a mixture of learned and random weights",
            f"use weights of {arch} with {'timm' if arch.startswith(TIMM) else 'torchvision'}'s names, or set "
            "model.arch to the network that the weights belong to",
        )
    model.load_state_dict(backbone, strict=False)


def load_head(model: nn.Module, state: Mapping[str, torch.Tensor], *, old: Sequence[str], new: Sequence[str]) -> int:
    """Load the head's rows of the classes that both networks know; the others stay fresh. Return their number.

    Args:
        state: of a network of the same architecture; the head has a weight [K_old, features] and mostly a bias [K_old].
        old: its K_old classes.
        new: the classes of `model`.
    """
    known = [(number, old.index(name)) for number, name in enumerate(new) if name in old]
    own, head = model.state_dict(), head_name(model)
    with torch.no_grad():
        for name in own.keys() & {f"{head}.weight", f"{head}.bias"}:
            for to, of in known:
                own[name][to] = state[name][of]
    return len(known)


def normalisation(arch: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of RGB in 0..1 that the ImageNet weights of a network of torchvision expect."""
    expected = torchvision.models.get_model_weights(arch).DEFAULT.transforms()
    return tuple(expected.mean), tuple(expected.std)


def refuse_imagenet_weights(settings: Model) -> None:
    """Refuse the ImageNet weights of a network of timm, and those that expect another normalisation.

    Raises:
        WeightsError: see above.
    """
    if settings.weights != "imagenet":
        return
    if settings.arch.startswith(TIMM):
        raise WeightsError(
            f"model.weights is imagenet, and model.arch is {settings.arch}: timm's weights come from a hub, without a "
            "hash that is known before",
            "random weights in their place would silently cost many points of accuracy",
            "set model.weights to the path of a .safetensors or .pth file with timm's names, or to none for random "
            "weights",
        )
    expected = normalisation(settings.arch)
    if expected != (settings.mean, settings.std):
        raise WeightsError(
            f"the ImageNet weights of {settings.arch} expect images normalised with mean {list(expected[0])} and std "
            f"{list(expected[1])}, and model.mean and model.std are {list(settings.mean)} and {list(settings.std)}",
            "its first layer would see other numbers than it was trained on",
            f"set model.mean to {list(expected[0])} and model.std to {list(expected[1])}",
        )


def _with_names_of_today(model: nn.Module, arch: str, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the state with the names of the installed torchvision: some published files have older ones.

    The network's own loading code renames them, except for a DenseNet.
    """
    if networks.is_resnet(arch):
        return state
    head = f"{head_name(model)}."
    state = {_DENSENET.sub(r"\1\2", key): value for key, value in state.items() if not key.startswith(head)}
    renamed = networks.build_shapes(arch, 2)
    try:
        found = renamed.load_state_dict(state, strict=False, assign=True)
    except RuntimeError:  # other shapes: `load_backbone` names them
        return state
    if found.unexpected_keys:
        return state
    missing = set(found.missing_keys)
    return {key: value for key, value in renamed.state_dict().items() if key not in missing and not value.is_meta}


def _imagenet(arch: str) -> tuple[dict[str, torch.Tensor], str]:
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    _refuse_other_content(cached)
    try:
        with _socket_timeout(_DOWNLOAD_TIMEOUT_S):
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return state, f"{weights} ({cached})"
    except pickle.UnpicklingError as error:
        raise _unsafe(cached, error) from error
    except (OSError, RuntimeError) as error:  # URLError, timeout, a hash that differs
        raise WeightsError(
            f"the ImageNet weights of {arch} are not at {cached} and cannot be downloaded from {weights.url}: {error}",
            "random weights in their place would silently cost many points of accuracy",
            "run once on a machine with internet access; or copy that file to that path; or copy it anywhere and set "
            "model.weights to its path; or set model.weights to none for random weights",
        ) from error


def _local(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():  # a model bundle, or a checkpoint
        path = next((p for p in sorted(path.glob("model*.safetensors"))), path / "model.safetensors")
    try:
        with open_regular(path) as file:
            if path.suffix == ".safetensors":
                return dict(load(file.read()))
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(
            f"model.weights is {str(path)!r}, and there is no such file",
            "the network would have no initial weights",
            "fix the path, or set model.weights to imagenet (needs internet or the cached file) or none (random)",
        ) from error
    except Exception as error:  # of a damaged file torch raises many kinds: KeyError, IndexError, AssertionError, ...
        raise _unsafe(path, error) from error
    if not isinstance(state, dict):
        raise _unsafe(path, TypeError(f"it holds a {type(state).__name__}, not a dict of tensors"))
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _refuse_other_content(cached: Path) -> None:
    """Raise a WeightsError if the file in torchvision's cache is not the published one: torch checks downloads only.

    torchvision's names end in the first digits of the content's sha256, such as resnet50-11ad3fa6.pth.
    """
    promised = cached.stem.rpartition("-")[2]
    if cached.exists():
        with storage("reading the ImageNet weights", cached), open_regular(cached) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(promised):
            raise WeightsError(
                f"{cached} has sha256 {found[:12]}..., and torchvision published {promised}... under this name",
                "these are not the ImageNet weights, and the file may hold code",
                "remove it and get the file of that name again, or set model.weights to the path of other weights",
            )


def _unsafe(path: Path, error: Exception) -> WeightsError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return WeightsError(
        f"{path} does not hold weights that can be loaded safely: {reason}",
        "an unsafe load could run code from the file",
        "save the weights again as .safetensors, or as a state_dict of tensors only",
    )


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Limit the waits of sockets: on a compute node without internet access a download would hang for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
