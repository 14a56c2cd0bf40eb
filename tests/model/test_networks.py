"""Networks by name, frozen stages that do not change, and initial weights that are never silently random."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wasteddp import settings
from wasteddp.errors import SettingsError, WeightsError
from wasteddp.model import networks, pretrained
from wasteddp.model.stages import Stages

EVIDENCE = Path("/none")  # the file that `Evil` creates where it is unpickled
pytestmark = pytest.mark.usefixtures("full_width")  # the tests count the parameters of each stage


def test_every_resnet_of_torchvision_can_be_named() -> None:
    assert {"resnet18", "resnet50", "resnet152", "resnext50_32x4d", "wide_resnet50_2"} <= set(networks.architectures())


def test_an_unknown_name_is_refused_with_the_known_names() -> None:
    with pytest.raises(SettingsError, match=r"'resnet51' is not a classifier(.|\n)*resnet50"):
        networks.build("resnet51", 3)


@pytest.mark.parametrize(("upto", "frozen_share"), [("none", 0.0), ("layer2", 0.06), ("backbone", 0.999)])
def test_frozen_stages_keep_weights_and_statistics(upto: str, frozen_share: float) -> None:
    model = networks.build("resnet18", 3)
    Stages(model).freeze(upto)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(p.numel() for n, p in model.named_parameters() if n in frozen) / total
    assert share == pytest.approx(frozen_share, abs=0.005)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    Stages(model).train_mode(upto)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    stages = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    kept = stages[: {"none": 0, "layer2": 4, "backbone": 6}[upto]]
    assert not [name for name in changed if name.split(".")[0] in kept]
    assert "fc.weight" in changed
    if "layer4" not in kept:
        assert "layer4.1.bn2.running_mean" in changed


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_blocks_start_as_the_identity_by_default(arch: str) -> None:
    for zero_init in (True, False):
        model = networks.build(arch, 3, zero_init=zero_init)
        last = model.layer1[0].bn3 if arch == "resnet50" else model.layer1[0].bn2
        assert bool((last.weight == 0).all()) == zero_init


def test_unfreezing_what_is_not_frozen_is_refused() -> None:
    with pytest.raises(SettingsError, match="unfreeze_every_epochs is 2, but freeze is none"):
        settings.parse("model: {unfreeze_every_epochs: 2}")


def test_weights_of_a_file_go_into_the_backbone_and_not_into_the_head(tmp_path: Path) -> None:
    source = networks.build("resnet18", 10)
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth"):
        if path.suffix == ".pth":
            torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
        else:
            save_file(source.state_dict(), path)
        model = networks.build("resnet18", 3)
        head = model.fc.weight.clone()
        assert str(path) in pretrained.initialise(model, "resnet18", str(path))
        assert torch.equal(model.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
        assert torch.equal(model.fc.weight, head)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(networks.build("resnet34", 3).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"\d+ of \d+ tensors are missing, .* different shape than in resnet1"):
        pretrained.initialise(networks.build("resnet18", 3), "resnet18", str(tmp_path / "w.safetensors"))


class _RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code ran",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"fc.weight": _RunsCode()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not hold weights that can be loaded safely"):
        pretrained.initialise(networks.build("resnet18", 3), "resnet18", str(tmp_path / "w.pth"))
    assert "code ran" not in capsys.readouterr().out


def test_a_missing_file_is_named() -> None:
    with pytest.raises(WeightsError, match=r"'/none/w.pth', and there is no such file"):
        pretrained.initialise(networks.build("resnet18", 3), "resnet18", "/none/w.pth")


def test_unavailable_imagenet_weights_are_an_error_not_a_random_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(WeightsError) as caught:
        pretrained.initialise(networks.build("resnet18", 3), "resnet18", "imagenet")
    message = str(caught.value)
    assert "Name or service not known" in message
    assert str(tmp_path / "checkpoints" / "resnet18-f37072fd.pth") in message
    assert all(way in message for way in ("with internet access", "set model.weights to its path", "to none"))


def test_imagenet_weights_are_taken_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the real loading code on a file with the name and hash that the hub checks."""
    import hashlib

    import torchvision

    source = networks.build("resnet18", 1000)
    path = tmp_path / "made.pth"
    torch.save(source.state_dict(), path)
    name = f"resnet18-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    (tmp_path / "checkpoints").mkdir()
    shutil.move(path, tmp_path / "checkpoints" / name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = type("Weights", (), {"DEFAULT": _Cached(name)})
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda arch: cached)
    model = networks.build("resnet18", 3)
    assert name in pretrained.initialise(model, "resnet18", "imagenet")
    assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {EVIDENCE}",))


@pytest.mark.parametrize("has_the_promised_hash", [False, True])
def test_a_foreign_file_in_the_cache_is_refused_and_runs_no_code(
    has_the_promised_hash: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    import torchvision

    monkeypatch.setattr(sys.modules[__name__], "EVIDENCE", tmp_path / "code ran")
    (tmp_path / "checkpoints").mkdir()
    torch.save({"a": Evil()}, tmp_path / "made.pth")
    digest = hashlib.sha256((tmp_path / "made.pth").read_bytes()).hexdigest()[:8]
    name = f"resnet18-{digest if has_the_promised_hash else 'f37072fd'}.pth"
    shutil.move(tmp_path / "made.pth", tmp_path / "checkpoints" / name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = type("Weights", (), {"DEFAULT": _Cached(name)})
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda arch: cached)
    message = "loaded safely" if has_the_promised_hash else r"published f37072fd\.\.\. under this name"
    with pytest.raises(WeightsError, match=message):
        pretrained.initialise(networks.build("resnet18", 3), "resnet18", "imagenet")
    assert not (tmp_path / "code ran").exists()


def test_damaged_weights_are_one_message(tmp_path: Path) -> None:
    """torch raises many kinds of errors for them."""
    path = tmp_path / "w.pth"
    torch.save({"fc.weight": torch.zeros(3, 8), "epoch": 3}, path)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(whole)
        for place in random.integers(0, len(whole), random.integers(1, 20)):
            content[place] = random.integers(256)
        path.write_bytes(content[: random.integers(1, len(whole) + 1)])
        with contextlib.suppress(WeightsError):
            pretrained._local(path)


class _Cached:
    """torchvision's own loading code, for another file."""

    def __init__(self, name: str) -> None:
        self.url = f"https://nowhere.invalid/{name}"

    def get_state_dict(self, **how: bool) -> dict[str, torch.Tensor]:
        return torch.hub.load_state_dict_from_url(self.url, **how)


def test_statistics_that_ranks_reconcile_are_all_of_batchnorm() -> None:
    model = networks.build("resnet18", 3)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(networks.running_statistics(model)) == 2 * len(norms)
