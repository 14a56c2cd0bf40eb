"""Writing checkpoints: complete or absent after a kill at any moment, and no more of them than set."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from kept import LINEAGE, save, states_of, steps_in
from torch import nn

from wasteddp.errors import StorageError
from wasteddp.training.checkpoint import reader
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.checkpoint.state import HostCopy
from wasteddp.training.checkpoint.writer import CheckpointWriter, inner_name, kept_steps, recover, refuse_full_disk


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, keep_last=2, best_step=2)
    assert steps_in(tmp_path) == [2, 4, 5]


def test_every_so_many_steps_one_is_kept_permanently(tmp_path: Path) -> None:
    save(tmp_path, *range(5, 60, 5), keep_last=1, keep_every=20)
    assert steps_in(tmp_path) == [20, 40, 55]


def test_those_kept_are_the_first_after_each_mark_however_irregular() -> None:
    steps = [3, 9, 11, 12, 19, 31, 32, 40, 55]
    assert kept_steps(steps, keep_last=1, keep_every=10, best_step=0) == {0, 11, 31, 40, 55}
    for done in range(1, len(steps)):  # pruning after each save keeps the same checkpoints as pruning once at the end
        left = [
            step for step in steps[:done] if step in kept_steps(steps[:done], keep_last=1, keep_every=10, best_step=0)
        ]
        assert {11, 31, 40} & set(steps[:done]) <= set(left)
    assert kept_steps([], keep_last=1, keep_every=10, best_step=0) == {0}


def test_a_damaged_newer_one_does_not_push_out_the_whole_ones(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, keep_last=2)
    (tmp_path / "step-00000010" / "model.safetensors").write_bytes(b"")
    save(tmp_path, 7, keep_last=1)  # the run resumed from 5
    assert steps_in(tmp_path) == [7, 10]
    found = reader.newest(tmp_path, lambda line: None)
    assert found is not None
    assert found.progress.step == 7


def test_a_save_copies_so_that_training_may_go_on(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=1)
    model = {"w": torch.zeros(1000)}
    for step in (1, 2):  # into new memory first, then into the same memory
        writer.save(Progress(LINEAGE, step=step), {"model": model, "optimizer": {}}, "")
        model["w"] += 1
    writer.close()
    assert reader.read(tmp_path / "step-00000002").states["model"]["w"].tolist() == [1] * 1000


def test_copies_lie_as_the_tensors_do_and_are_used_again() -> None:
    host = HostCopy()
    weight = torch.rand(4, 3, 3, 3).to(memory_format=torch.channels_last)
    first = host.of({"model": {"w": weight, "b": torch.zeros(2)}})["model"]
    assert first["w"].stride() == weight.stride()
    again = host.of({"model": {"w": weight + 1}})["model"]
    assert again["w"].data_ptr() == first["w"].data_ptr()
    assert torch.equal(again["w"], weight + 1)
    assert again.keys() == {"w"}, "what is not in the state any more is not saved"
    assert host.of({"model": {"w": torch.zeros(2, dtype=torch.int64)}})["model"]["w"].dtype == torch.int64


def test_any_state_is_kept_under_its_name(tmp_path: Path) -> None:
    save(tmp_path, 1, states={**states_of(1), "ema": {"w": torch.tensor([3.0])}})
    assert reader.read(tmp_path / "step-00000001").states["ema"]["w"].tolist() == [3.0]


def test_no_file_has_the_names_of_wrappers(tmp_path: Path) -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    save(tmp_path, 1, states={"model": compiled.state_dict(), "optimizer": {}})
    assert reader.read(tmp_path / "step-00000001").states["model"].keys() == {"0.weight", "0.bias"}
    assert inner_name("exp_avg:module.fc.weight") == "exp_avg:fc.weight"
    assert inner_name("layer1._orig_mod.conv1.weight") == "layer1.conv1.weight"


def test_what_follows_a_save_comes_when_it_is_on_the_disk(tmp_path: Path) -> None:
    seen: list[list[int]] = []
    save(tmp_path, 1, 2, after=lambda: seen.append(steps_in(tmp_path)))
    assert seen == [[1], [1, 2]]


def test_a_full_disk_at_a_save_is_one_message_and_harms_nothing_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, keep_last=1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    writer.save(Progress(LINEAGE, step=2), states_of(2), "")
    with pytest.raises(StorageError, match="writing a checkpoint: No space left on device"):
        writer.close()
    monkeypatch.undo()
    found = reader.newest(tmp_path, lambda line: None)
    assert found is not None
    assert found.progress.step == 1
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "the remains are cleared at the next start"


def test_a_checkpoint_that_was_to_be_replaced_is_put_back(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    kept = (tmp_path / "step-00000002" / "complete.json").read_bytes()
    # a kill between the two renames
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.replaced.tmp")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.tmp")
    recover(tmp_path)
    assert (tmp_path / "step-00000002" / "complete.json").read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    # a kill after both: the new checkpoint stays
    (tmp_path / ".step-00000002.replaced.tmp").mkdir()
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    save(tmp_path, 2, states={"model": {"w": torch.ones(1)}, "optimizer": {}})
    assert steps_in(tmp_path) == [1, 2]
    assert reader.read(tmp_path / "step-00000002").states["model"].keys() == {"w"}


def test_a_disk_that_is_too_small_is_refused_before_the_run(tmp_path: Path) -> None:
    refuse_full_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(StorageError, match=r"has [\d,]+ MB free; the checkpoints take 1,000,000,000,000 MB"):
        refuse_full_disk(tmp_path / "not" / "yet", 10**18)
