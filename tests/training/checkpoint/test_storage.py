"""A full disk or a read-only folder while a run saves: training continues and loses nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from trainings import config_of, final_weights, rows

from wasteddp import train
from wasteddp.inference.bundle import load_bundle
from wasteddp.training.checkpoint.reader import listed, read
from wasteddp.training.meter import Meter


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Callable[[], Any]]], None]:
    """Call functions at the end of given steps."""

    def arrange(actions: dict[int, Callable[[], Any]]) -> None:
        real, steps = Meter.step_done, iter(range(1, 100))

        def step_done(self: Meter, *arguments: Any) -> None:
            real(self, *arguments)
            actions.get(next(steps), lambda: None)()

        monkeypatch.setattr(Meter, "step_done", step_done)

    return arrange


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 500 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=500m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system, and not everywhere")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Fill the disk. A checkpoint that is being written may take some space first, so this is repeated."""
    with (folder / "filler").open("wb") as file:
        while (usage := os.statvfs(folder)).f_bavail:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, usage.f_bavail * usage.f_frsize)


def arguments_on(disk: Path, tmp_path: Path, shards: Path) -> list[str]:
    return [*config_of(tmp_path, shards), "--set", f"run.out={disk / 'run'}"]


def test_a_disk_that_is_full_for_a_while_costs_only_the_saves_in_between(
    small_disk: Path,
    small_shards: Path,
    tmp_path: Path,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[int] = []

    def look() -> None:
        seen.extend(read(path).progress.step for path in listed(small_disk / "run" / "checkpoints"))

    at_step({3: lambda: fill(small_disk), 5: look, 6: lambda: (small_disk / "filler").unlink()})
    assert train.main(arguments_on(small_disk, tmp_path, small_shards)) == 0
    assert seen, "while the disk was full, an intact checkpoint was there"
    found = rows(small_disk / "run")
    assert [row["step"] for row in found] == list(range(1, 9))
    assert found[-1]["checkpoint/failed"] >= 1
    said = capsys.readouterr().out
    assert "WARNING: not saved: writing a checkpoint: No space left on device" in said
    assert "WARNING: not saved" in (small_disk / "run" / "log.txt").read_text()
    assert read(listed(small_disk / "run" / "checkpoints")[-1]).progress.step == 8
    assert load_bundle(small_disk / "run")[0].trained.step in (4, 8)
    assert not list((small_disk / "run" / "checkpoints").glob(".step-*"))


def test_a_model_that_cannot_be_written_at_the_end_is_an_error_and_can_be_had_later(
    small_disk: Path,
    small_shards: Path,
    tmp_path: Path,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_step({6: lambda: fill(small_disk)})
    arguments = arguments_on(small_disk, tmp_path, small_shards)
    assert train.main(arguments) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert read(listed(small_disk / "run" / "checkpoints")[-1]).progress.step < 8
    (small_disk / "filler").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train.main(arguments) == 0
    assert rows(small_disk / "run")[-1]["step"] == 8


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_for_a_while_changes_no_weight(
    code: int, small_shards: Path, tmp_path: Path, at_step: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = [False]
    real = Path.open

    def guarded(self: Path, mode: str = "r", *rest: Any, **how: Any) -> Any:
        if refusing[0] and "w" in mode and str(tmp_path) in str(self):
            raise OSError(
                code, os.strerror(code), str(self)
            )  # root may write everywhere, so a real folder would not refuse
        return real(self, mode, *rest, **how)

    monkeypatch.setattr(Path, "open", guarded)
    (tmp_path / "whole").mkdir()
    assert train.main(config_of(tmp_path / "whole", small_shards)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)

    def refuse(now: bool) -> Callable[[], None]:
        return lambda: refusing.__setitem__(0, now)

    arguments = config_of(tmp_path, small_shards)
    at_step({4: refuse(True), 7: refuse(False)})  # this includes the first evaluation, which has a best model
    assert train.main(arguments) == 0
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "whole" / "run")
    assert rows(tmp_path / "run")[-1]["checkpoint/failed"] >= 2
    assert load_bundle(tmp_path / "run")[1].keys() == load_bundle(tmp_path / "whole" / "run")[1].keys()
    assert os.strerror(code) in (tmp_path / "run" / "log.txt").read_text()
