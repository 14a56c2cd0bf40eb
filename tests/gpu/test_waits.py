"""Operations that the host launches on a GPU without waiting for it."""

from __future__ import annotations

import pytest
import torch
from gpu_waits import ON_A_GPU, no_wait_for_the_gpu
from test_ema import DECAY, network
from test_gpu_decoding import one_by_one, photos
from test_lars_lamb import built, gradients, model_of
from test_operations import every_operation, pictures

from wasteddp.data import gpu_decoding
from wasteddp.data.augmentation.operations import apply
from wasteddp.model.ema import Ema

pytestmark = ON_A_GPU


def test_the_check_finds_a_wait_and_is_off_afterwards() -> None:
    tensor = torch.zeros((), device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), no_wait_for_the_gpu():
        tensor.item()
    assert tensor.item() == 0


def test_operations_of_a_policy() -> None:
    images, (operations, magnitudes) = pictures(65, 64).repeat(12, 1, 1, 1).cuda(), every_operation(60)
    apply(images, operations, magnitudes)
    with no_wait_for_the_gpu():
        apply(images, operations, magnitudes)


def test_an_update_of_the_average() -> None:
    model = network().cuda()
    average, skipped = Ema(model, DECAY), torch.tensor(False, device="cuda")
    with no_wait_for_the_gpu():
        average.update(0, None)
        average.update(1, skipped)
    assert torch.equal(average.network.state_dict()["0.weight"], model.state_dict()["0.weight"])


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize("may_skip", [False, True])
def test_a_step_for_large_batches(name: str, may_skip: bool) -> None:
    model = model_of().cuda()
    optimizer = built(name, model)
    if may_skip:
        optimizer.found_inf = torch.zeros((), device="cuda")  # type: ignore[attr-defined]
    values = gradients(model, 0)
    for key, parameter in model.named_parameters():
        parameter.grad = torch.from_numpy(values[key]).float().cuda()
    optimizer.step()  # creates the state
    with no_wait_for_the_gpu():
        optimizer.step()


def test_crops_resized_on_the_device_which_are_those_of_the_cpu() -> None:
    images, boxes = photos(140, seed=4, most_px=500)
    out = torch.zeros(140, 3, 64, 64, dtype=torch.uint8, device="cuda")
    on_gpu = [image.cuda() for image in images]
    with no_wait_for_the_gpu():
        gpu_decoding.resize_crops(out, range(140), on_gpu, boxes)
    apart = (out.cpu().int() - one_by_one(images, boxes, (64, 64)).int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-3
