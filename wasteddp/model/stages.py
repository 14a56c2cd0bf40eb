"""The stages of a network, in the order of the forward pass, for freezing and for learning rates by stage.

All families have the same names. A stage ends where the next one halves the resolution, as in a ResNet. A vision
transformer has one resolution, and its stages are quarters of its blocks. Networks without either (AlexNet, VGG) have
one stage, "backbone". The head, which is the last layer, belongs to no stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision import models

from wasteddp.errors import SettingsError
from wasteddp.model.networks import head_name

# Freezing a stage also freezes the stages before it.
STAGES = ("stem", "layer1", "layer2", "layer3", "backbone")

# Names with which the parameters of layer1, layer2, layer3 and backbone begin.
_STARTS: tuple[tuple[type[nn.Module], tuple[str, str, str, str]], ...] = (
    (models.ResNet, ("layer1", "layer2", "layer3", "layer4")),
    (models.RegNet, ("trunk_output.block1", "trunk_output.block2", "trunk_output.block3", "trunk_output.block4")),
    (models.ConvNeXt, ("features.1", "features.2", "features.4", "features.6")),
    (models.SwinTransformer, ("features.1", "features.2", "features.4", "features.6")),
    (models.MaxVit, ("blocks.0", "blocks.1", "blocks.2", "blocks.3")),
    (models.ShuffleNetV2, ("stage2", "stage3", "stage4", "conv5")),
    (
        models.DenseNet,
        ("features.denseblock1", "features.transition1", "features.transition2", "features.transition3"),
    ),
)


class Stages:
    """The stages of one network. Create it after BatchNorm was converted, if at all.

    Args:
        model: not wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._head = head_name(model)
        starts = stage_starts(model)
        self.are_known = bool(starts)
        names = [name for name, _ in model.named_parameters() if not self.is_head(name)]
        if self.are_known:
            places = [next(i for i, name in enumerate(names) if _is_within(name, start)) for start in starts]
            numbers = [sum(place >= start for start in places) for place in range(len(names))]
        else:
            numbers = [len(STAGES) - 1] * len(names)
        self._number = dict(zip(names, numbers, strict=True))
        # the stage of the last parameter in each module
        self._last = {module: len(STAGES) for module in _parents(f"{self._head}.weight")}
        for name, number in self._number.items():
            for module in _parents(name):
                self._last[module] = max(self._last.get(module, 0), number)

    def is_head(self, name: str) -> bool:
        """Return whether the parameter of that name belongs to the head."""
        return _is_within(name, self._head)

    def distance_from_head(self, name: str) -> int:
        """Return how many stages before the head a parameter is, from its name.

        Of a ResNet, "fc.weight" 0, "conv1.weight" 5.
        """
        return 0 if self.is_head(name) else len(STAGES) - self._number[name]

    def parameters(self, upto: str) -> list[nn.Parameter]:
        """Return the parameters of all stages up to and including `upto`; of none if it is "none"."""
        last = _number(upto)
        return [p for name, p in self._model.named_parameters() if self._number.get(name, len(STAGES)) <= last]

    def modules(self, upto: str) -> list[nn.Module]:
        """Return the largest modules all of whose parameters are in these stages."""
        last = _number(upto)
        return [
            module
            for name, module in self._model.named_modules()
            if self._last.get(name, len(STAGES)) <= last < self._last.get(name.rpartition(".")[0], len(STAGES))
        ]

    def freeze(self, upto: str) -> None:
        """Disable gradients for every stage up to and including `upto`; "none": all stages stay trainable."""
        for parameter in self.parameters(upto):
            parameter.requires_grad_(False)

    def drop_gradients(self, upto: str) -> None:
        """Delete the gradients of stages that are frozen now but trained later, so that the optimizer does not change
        them.

        Their parameters keep `requires_grad`, because DDP plans its messages once, for the parameters that have it at
        the start. The cost is a backward pass through the frozen stages.
        """
        for parameter in self.parameters(upto):
            parameter.grad = None

    def train_mode(self, upto: str) -> None:
        """Set training mode, except for the frozen stages: their BatchNorm must use and keep its running statistics.

        Otherwise the statistics of frozen stages would change with every batch, although no weight does.
        """
        self._model.train()
        for module in self.modules(upto):
            module.eval()


def stage_starts(model: nn.Module) -> Sequence[str]:
    """Return the names with which layer1, layer2, layer3 and backbone begin; none if the network has no stages."""
    for kind, starts in _STARTS:
        if isinstance(model, kind):
            return starts
    if isinstance(model, models.EfficientNet | models.MobileNetV2 | models.MobileNetV3):
        return _halvings(model.features, "features")
    if isinstance(model, models.VisionTransformer):
        return _quarters([f"encoder.layers.{name}" for name, _ in model.encoder.layers.named_children()])
    if parts := getattr(model, "feature_info", None):  # timm
        return _starts_in_timm(model, [(part["module"], part["reduction"]) for part in parts])
    return ()


def refuse_stages(stages: Stages, arch: str, *, freeze: str, layer_decay: float) -> None:
    """Refuse settings that need stages of a network without.

    Raises:
        SettingsError: a stage is frozen other than all of them, or stages have their own learning rates.
    """
    asked = [f"model.freeze is {freeze}"] if freeze not in ("none", STAGES[-1]) else []
    asked += [f"optimizer.layer_decay is {layer_decay:g}"] if layer_decay != 1 else []
    if asked and not stages.are_known:
        raise SettingsError(
            f"{arch} has no stages, and {' and '.join(asked)}",
            "the setting would have no meaning",
            "set model.freeze to none or backbone (all but the head) and optimizer.layer_decay to 1, or use another "
            "model.arch",
        )


def _halvings(parts: nn.Module, prefix: str) -> list[str]:
    """Return the parts with which the resolution becomes 1/4, 1/8, 1/16 and 1/32 of the image's."""
    halve = [
        f"{prefix}.{name}"
        for name, part in parts.named_children()
        if any(isinstance(module, nn.Conv2d) and module.stride[0] == 2 for module in part.modules())
    ]
    return halve[1:]  # the first is the stem


def _quarters(blocks: Sequence[str]) -> list[str]:
    return [blocks[len(blocks) * quarter // 4] for quarter in range(4)]


def _starts_in_timm(model: nn.Module, parts: Sequence[tuple[str, int]]) -> Sequence[str]:
    """Return the names of the first parameters of the four stages, or () if timm does not describe them.

    Args:
        parts: names of modules whose output is a feature map, and the map's reduction of the image's side.
    """
    names = [name for name, _ in model.named_parameters()]
    last = [(name, of) for (name, of), (_, after) in zip(parts, [*parts[1:], ("", 0)], strict=True) if of != after]
    if len({of for _, of in parts}) == 1 and len(parts) >= 4:
        starts = _quarters([name for name, _ in parts])
        return starts if all(any(_is_within(name, start) for name in names) for start in starts) else ()
    if [of for _, of in last][-4:] != [4, 8, 16, 32]:
        return ()
    ends = [max((i for i, name in enumerate(names) if _is_within(name, part)), default=-1) for part, _ in last[-4:]]
    first = next((i for i, name in enumerate(names) if _is_within(name, last[-4][0])), -1)
    if len(last) > 4:  # the stage of half the resolution ends the stem
        before = max((i for i, name in enumerate(names) if _is_within(name, last[-5][0])), default=first - 1)
        first = before + 1
    places = [first, *(end + 1 for end in ends[:3])]
    if min(ends) < 0 or first < 0 or sorted(set(places)) != places:
        return ()
    return [names[place] for place in places]


def _number(upto: str) -> int:
    return -1 if upto == "none" else STAGES.index(upto)


def _is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _parents(name: str) -> list[str]:
    """Return the names of the modules that hold a parameter: "", "layer1", "layer1.0", "layer1.0.conv1"."""
    parts = name.split(".")
    return [".".join(parts[:number]) for number in range(len(parts))]
