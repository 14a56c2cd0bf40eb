"""Reading checkpoints: verified by hash, never unpickled, never of another run; older formats can be read."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kept import LINEAGE, save, tensors

from wasteddp.errors import CheckpointError
from wasteddp.training.checkpoint import reader
from wasteddp.training.checkpoint.progress import Progress

STORED = Path(__file__).parents[2] / "stored"


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found = reader.read(tmp_path / "step-00000007")
    assert found.progress == Progress(LINEAGE, step=7, best_value=0.5, tracker_id="abc")
    for name, tensor in tensors(7).items():
        assert torch.equal(found.states["model"][name], tensor)
    assert found.states["optimizer"]["momentum_buffer:conv.weight"].tolist() == [1, 1, 1]
    assert found.settings_yaml == "a: 1\n"
    assert {path.suffix for path in (tmp_path / "step-00000007").iterdir()} == {".safetensors", ".json", ".yaml"}


@pytest.mark.parametrize(("version", "size"), [(1, "64 px (resized to 73)"), (2, "224 px (resized to 256)")])
def test_a_checkpoint_of_an_older_format_is_read(version: int, size: str) -> None:
    found = reader.read(STORED / f"checkpoint-format-{version}" / "step-00000007")
    # fields that the lineage of format 1 lacks come from the settings; format 2 has no balance
    wanted = replace(LINEAGE, block=4, window=8)
    measure = f"accuracy on val of manifest mmmmmmmmmmmm at {size}"
    assert found.progress == Progress(wanted, step=7, best_value=0.5, best_step=7, tracker_id="abc", best_in=measure)
    assert found.states["model"]["fc.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.states["optimizer"].keys() == {"momentum_buffer:fc.weight"}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("flipped bit", "with sha256"),
        ("cut", "with sha256"),
        ("file missing", "No such file"),
        ("not complete", "No such file"),
        ("newer format", "its format is wasteddp-checkpoint 5; this wasteddp reads wasteddp-checkpoint 1, 2, 3, 4"),
        ("foreign", "its format is lightning 4"),
        ("path outside", "is not a plain file name"),
        ("not json", "Expecting property name"),
        ("a list", "list indices"),
        ("deep", "recursion depth"),
        ("a pipe", "it is a pipe or a device, not a file"),
        ("no model", "has no state of: model"),
        ("unknown progress", "unexpected keyword argument 'mood'"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path, damage: str, reason: str) -> None:
    save(tmp_path, 1, 2)
    newest = tmp_path / "step-00000002"
    weights, complete = newest / "model.safetensors", newest / "complete.json"
    text = complete.read_text()
    if damage == "flipped bit":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "cut":
        os.truncate(weights, weights.stat().st_size - 4)
    elif damage == "file missing":
        weights.unlink()
    elif damage == "a pipe":
        weights.unlink()
        os.mkfifo(weights)
    elif damage == "not complete":
        complete.unlink()
    elif damage == "no model":
        save(tmp_path, 2, states={"optimizer": {}})
    elif damage == "unknown progress":
        progress = json.loads((newest / "progress.json").read_text())
        _rewrite(newest, "progress.json", json.dumps(progress | {"mood": 1}).encode())
    else:
        complete.write_text(
            {
                "newer format": text.replace('"format_version": 4', '"format_version": 5'),
                "foreign": text.replace('"wasteddp-checkpoint"', '"lightning"'),
                "path outside": text.replace("model.safetensors", "../../model.safetensors"),
                "not json": "{",
                "a list": "[]",
                "deep": "[" * 100_000,
            }[damage]
        )
    said: list[str] = []
    found = reader.newest(tmp_path, said.append)
    assert found is not None
    assert found.progress.step == 1
    assert len(said) == 1
    assert f"skipped {newest}" in said[0]
    assert reason in said[0]


def test_a_pickle_in_a_checkpoint_is_never_opened(tmp_path: Path) -> None:
    save(tmp_path, 1)
    poison = pickle.dumps(_Poison(str(tmp_path / "ran")))
    _rewrite(tmp_path / "step-00000001", "model.safetensors", poison)  # with the correct hash
    with pytest.raises(CheckpointError, match="is not an intact checkpoint"):
        reader.read(tmp_path / "step-00000001")
    assert not (tmp_path / "ran").exists()


def test_no_whole_one_left_is_an_error_and_no_silent_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "complete.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .* is intact"):
        reader.newest(tmp_path, lambda line: None)


def test_none_at_all_is_a_beginning(tmp_path: Path) -> None:
    assert reader.starting_point(tmp_path / "none", "auto", print) is None
    assert reader.starting_point(tmp_path / "none", "never", print) is None


def test_never_does_not_overwrite_a_run(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"--resume never, and .* holds 1 checkpoints, the newest of step 4"):
        reader.starting_point(tmp_path, "never", print)


def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not an intact checkpoint"):
        reader.starting_point(tmp_path, str(tmp_path / "nowhere"), print)


def test_an_older_one_of_the_same_run_is_not_gone_on_from_beside_the_newer(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match="holds step-00000002, which is newer"):
        reader.starting_point(tmp_path, str(tmp_path / "step-00000001"), print)
    newest = reader.starting_point(tmp_path, str(tmp_path / "step-00000002"), print)
    assert newest is not None
    assert newest.progress.step == 2


def test_the_same_command_goes_on_from_what_it_made_of_another_runs_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "old", 3)
    start = str(tmp_path / "old" / "step-00000003")
    said: list[str] = []
    first = reader.starting_point(tmp_path / "new" / "checkpoints", start, said.append)
    assert first is not None
    assert first.path == Path(start)
    save(tmp_path / "new" / "checkpoints", 4, 5)
    again = reader.starting_point(tmp_path / "new" / "checkpoints", start, said.append)
    assert again is not None
    assert again.progress.step == 5
    assert said == [f"{tmp_path / 'new'} already continues {start}: resuming from its own newest checkpoint"]


def test_progress_knows_the_best_and_when_to_stop() -> None:
    progress = Progress(LINEAGE, step=1).with_evaluation(0.5)
    progress = replace(progress, step=2).with_evaluation(0.5)
    assert (progress.best_step, progress.evaluations_since_best) == (1, 1)
    assert progress.stopped_early(1)
    assert not progress.stopped_early(2)
    assert not progress.stopped_early(0)
    assert replace(progress, step=3).with_evaluation(0.6).best_step == 3


def test_the_best_may_be_zero_and_is_never_no_number() -> None:
    progress = Progress(LINEAGE, step=1)
    assert progress.best_metric == {}
    progress = progress.with_evaluation(float("nan"))
    assert (progress.best_value, progress.evaluations_since_best) == (None, 1)
    progress = replace(progress, step=2).with_evaluation(0.0)
    assert (progress.best_metric, progress.best_step) == ({"best/value": 0.0}, 2)
    assert replace(progress, step=3).with_evaluation(0.0).best_step == 2


def test_progress_json_is_plain(tmp_path: Path) -> None:
    save(tmp_path, 1)
    content = json.loads((tmp_path / "step-00000001" / "progress.json").read_text())
    assert content["step"] == 1
    assert content["lineage"]["classes"] == ["glass", "paper"]


def _rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint and its hash."""
    import hashlib

    (folder / name).write_bytes(content)
    complete = json.loads((folder / "complete.json").read_text())
    complete["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / "complete.json").write_text(json.dumps(complete))


class _Poison:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_checkpoint_in_a_folder_of_another_step_is_skipped(tmp_path: Path) -> None:
    for step in (5, 7):
        save(tmp_path, step)
    (tmp_path / "step-00000005").rename(tmp_path / "step-00000999")
    lines: list[str] = []
    found = reader.newest(tmp_path, lines.append)
    assert found is not None
    assert found.progress.step == 7
    assert "its name says step 999, and it holds step 5" in lines[0]


def test_a_folder_whose_name_is_no_step_is_not_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for name in ("step-²", "step-", "step-5.old", f"step-{10**40}"):
        (tmp_path / name).mkdir()
    assert [path.name for path in reader.listed(tmp_path)] == ["step-00000005"]


def test_a_run_is_taken_for_its_newest_intact_checkpoint(tmp_path: Path) -> None:
    for step in (5, 7):
        save(tmp_path / "old" / "checkpoints", step)
    (tmp_path / "old" / "checkpoints" / "step-00000007" / "model.safetensors").write_bytes(b"cut")
    for path in (tmp_path / "old", tmp_path / "old" / "checkpoints"):
        found = reader.starting_point(tmp_path / "new" / "checkpoints", str(path), print)
        assert found is not None
        assert found.progress.step == 5
