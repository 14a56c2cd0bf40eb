"""Checkpoints: whole or not there, proved by hash, never unpickled, and never of another run."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wasteddp.errors import CheckpointError, StorageError
from wasteddp.training import checkpoints
from wasteddp.training.checkpoints import CheckpointWriter, Lineage, Progress

LINEAGE = Lineage("m" * 64, ("glass", "paper"), "resnet18", 0, 32, 32, 64, "sgd")


def tensors(step: int) -> dict[str, torch.Tensor]:
    image = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4) + step
    return {"conv.weight": image.to(memory_format=torch.channels_last), "bn.num_batches_tracked": torch.tensor(step)}


def save(folder: Path, *steps: int, keep_last: int = 10, best_step: int = 0) -> None:
    writer = CheckpointWriter(folder, keep_last)
    for step in steps:
        progress = Progress(LINEAGE, step=step, best_value=0.5, best_step=best_step, tracker_id="abc")
        writer.save(progress, tensors(step), {"momentum_buffer:conv.weight": torch.ones(3)}, "a: 1\n")
    writer.close()


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found = checkpoints.read(tmp_path / "step-00000007")
    assert found.progress == Progress(LINEAGE, step=7, best_value=0.5, tracker_id="abc")
    for name, tensor in tensors(7).items():
        assert torch.equal(found.model[name], tensor)
    assert found.optimizer["momentum_buffer:conv.weight"].tolist() == [1, 1, 1]
    assert {path.suffix for path in (tmp_path / "step-00000007").iterdir()} == {".safetensors", ".json", ".yaml"}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, keep_last=2, best_step=2)
    assert [checkpoints.step_of(path) for path in checkpoints.listed(tmp_path)] == [2, 4, 5]


def test_a_save_copies_so_that_training_may_go_on(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 1)
    model = {"w": torch.zeros(1000)}
    writer.save(Progress(LINEAGE, step=1), model, {}, "")
    model["w"] += 1
    writer.close()
    assert checkpoints.read(tmp_path / "step-00000001").model["w"].sum() == 0


@pytest.mark.parametrize(
    "damage", ["flipped bit", "cut", "file missing", "not complete", "newer format", "path outside", "not json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1, 2)
    newest = tmp_path / "step-00000002"
    weights, complete = newest / "model.safetensors", newest / "complete.json"
    if damage == "flipped bit":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "cut":
        os.truncate(weights, weights.stat().st_size - 4)
    elif damage == "file missing":
        weights.unlink()
    elif damage == "not complete":
        complete.unlink()
    elif damage == "newer format":
        complete.write_text(complete.read_text().replace('"format_version": 1', '"format_version": 2'))
    elif damage == "path outside":
        complete.write_text(complete.read_text().replace("model.safetensors", "../../model.safetensors"))
    else:
        complete.write_text("{")
    said: list[str] = []
    found = checkpoints.newest(tmp_path, said.append)
    assert found is not None
    assert found.progress.step == 1
    assert len(said) == 1
    assert f"passed over {newest}" in said[0]


def test_no_whole_one_left_is_an_error_and_no_silent_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "complete.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .* is whole"):
        checkpoints.newest(tmp_path, lambda line: None)


def test_none_at_all_is_a_beginning(tmp_path: Path) -> None:
    assert checkpoints.starting_point(tmp_path / "none", "auto", LINEAGE, print) is None
    assert checkpoints.starting_point(tmp_path / "none", "never", LINEAGE, print) is None


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    save(tmp_path, 1)
    wanted = replace(LINEAGE, classes=("glass", "metal"), seed=3)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.starting_point(tmp_path, "auto", wanted, print)
    assert "classes was ('glass', 'paper') and is ('glass', 'metal'); seed was 0 and is 3" in str(caught.value)


def test_never_does_not_overwrite_a_run(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"--resume never, and .* holds 1 checkpoints, the newest of step 4"):
        checkpoints.starting_point(tmp_path, "never", LINEAGE, print)


def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a whole checkpoint"):
        checkpoints.starting_point(tmp_path, str(tmp_path / "nowhere"), LINEAGE, print)


def test_a_full_disk_at_a_save_is_one_message_and_harms_nothing_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    writer.save(Progress(LINEAGE, step=2), tensors(2), {}, "")
    with pytest.raises(StorageError, match="writing a checkpoint: No space left on device"):
        writer.close()
    monkeypatch.undo()
    found = checkpoints.newest(tmp_path, lambda line: None)
    assert found is not None
    assert found.progress.step == 1
    CheckpointWriter(tmp_path, 1).close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "the remains are cleared at the next start"


def test_a_disk_that_is_too_small_is_refused_before_the_run(tmp_path: Path) -> None:
    checkpoints.refuse_full_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(StorageError, match=r"has [\d,]+ MB free; the checkpoints take 1,000,000,000,000 MB"):
        checkpoints.refuse_full_disk(tmp_path / "not" / "yet", 10**18)


def test_progress_knows_the_best_and_when_to_stop() -> None:
    progress = Progress(LINEAGE, step=1).with_evaluation(0.5)
    progress = replace(progress, step=2).with_evaluation(0.5)
    assert (progress.best_step, progress.evaluations_since_best) == (1, 1)
    assert progress.stopped_early(1)
    assert not progress.stopped_early(2)
    assert not progress.stopped_early(0)
    assert replace(progress, step=3).with_evaluation(0.6).best_step == 3


def test_progress_json_is_plain(tmp_path: Path) -> None:
    save(tmp_path, 1)
    content = json.loads((tmp_path / "step-00000001" / "progress.json").read_text())
    assert content["step"] == 1
    assert content["lineage"]["classes"] == ["glass", "paper"]
