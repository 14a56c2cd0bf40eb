"""Gradual unfreezing together with the other parts of a recipe that change with the step: frozen stages do not move,
and a run that resumes in the middle ends with the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from kept import LINEAGE
from safetensors.torch import load_file
from trainings import config_of, final_weights, rows

from wasteddp import settings, train
from wasteddp.model import networks
from wasteddp.model.stages import Stages
from wasteddp.training import optimizers
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.distributed import startup
from wasteddp.training.divergence import Guard


@pytest.mark.parametrize(
    "optimizer", ["{name: sgd}", "{name: adamw}", "{name: lars}", "{name: lamb, layer_decay: 0.8}"]
)
def test_what_is_frozen_now_and_trained_later_neither_moves_nor_decays_until_then(optimizer: str) -> None:
    model = networks.build("resnet18", 3)
    Stages(model).freeze("stem")  # permanently
    parsed = settings.parse(
        f"optimizer: {optimizer}\nmodel: {{freeze: layer3, unfreeze_every_epochs: 1}}\nrun: {{threads: 1}}"
    )
    built = optimizers.build(model, parsed.optimizer)
    Guard(parsed, startup.start_runtime(parsed), model, built, num_classes=3, progress=Progress(LINEAGE))
    for upto in ("layer3", "layer2", "layer1", "stem", "none"):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        Stages(model).train_mode(upto)
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        Stages(model).drop_gradients(upto)
        built.step()
        built.zero_grad()
        changed = {name.split(".")[0] for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
        moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        names = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
        after = {"none": 0, "stem": 2, "layer1": 3, "layer2": 4, "layer3": 5}[upto]
        assert moved == set(names[max(2, after) :])  # the stem's weights stay frozen, but not its statistics:
        assert changed == set(names[after:]) - {"conv1"}


RECIPE = (
    "optimizer.name=lamb", "optimizer.lr=0.05",
    "model.freeze=layer3", "model.unfreeze_every_epochs=0.5", "model.stochastic_depth=0.5", "optimizer.layer_decay=0.7",
    "optimizer.weight_decay=0.1", "optimizer.adaptive_clip=0.05", "optimizer.clip_norm=0.5", "checkpoint.keep_last=9",
    "schedule.name=cosine_restarts", "schedule.cycle_epochs=1", "train.on_divergence=skip",
)  # fmt: skip


def test_a_run_goes_on_in_the_middle_of_it_all_bit_for_bit(small_shards: Path, tmp_path: Path) -> None:
    arguments = config_of(tmp_path, small_shards)
    for setting in RECIPE:
        arguments += ["--set", setting]
    assert train.main(arguments) == 0
    run = tmp_path / "run"
    saved = {step: load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step in range(1, 9)}

    def moved(first: int, last: int) -> set[str]:
        return {key.split(".")[0] for key, t in saved[last].items() if not torch.equal(t, saved[first][key])}

    assert moved(1, 2) == {"layer4", "fc"}  # an epoch has 4 steps; layer3 is trained from the third step on
    assert moved(2, 4) == {"layer3", "layer4", "fc"}
    assert moved(4, 6) == {"layer2", "layer3", "layer4", "fc"}
    assert moved(6, 8) == {"layer1", "layer2", "layer3", "layer4", "fc"}
    done = rows(run)
    assert all(row["train/grad_norm"] > 0.5 for row in done)  # the norm before clipping
    assert [row["lr"] for row in done[:1]] == [row["lr"] for row in done[4:5]]  # a restart
    whole = final_weights(run)
    for step in (4, 6, 7, 8):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(run / "model")
    assert train.main(arguments) == 0  # from step 5, in the middle of a cycle, before layer1 is unfrozen
    assert rows(run)[-1]["attempt"] == 2
    assert final_weights(run) == whole
