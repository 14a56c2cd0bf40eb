"""Each epoch proves that it used every sample once; otherwise the run stops, also if it was resumed in between."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainings import config_of, edit_progress, rows, run_ranks

from wasteddp import train
from wasteddp.data.loader import Loader
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.order.coverage import digest, digest_of_range, to_signed
from wasteddp.training import dataloaders


@given(samples=st.lists(st.integers(0, 10**12), max_size=50), seed=st.integers(0, 2**40), at=st.integers(0, 50))
def test_a_digest_adds_up_in_any_order_and_in_any_parts(samples: list[int], seed: int, at: int) -> None:
    whole = digest(seed, np.array(samples, np.int64))
    assert digest(seed, np.array(sorted(samples), np.int64)) == whole
    parts = [digest(seed, np.array(part, np.int64)) for part in (samples[:at], samples[at:])]
    assert to_signed(sum(parts)) == whole
    assert -(2**63) <= whole < 2**63


@pytest.mark.parametrize("num", [0, 1, 2**15 - 1, 2**15, 2**15 + 1])
def test_the_digest_of_a_range_is_that_of_its_samples(num: int) -> None:
    assert digest_of_range(3, 7, 7 + num) == digest(3, np.arange(7, 7 + num))


@given(samples=st.lists(st.integers(0, 1000), min_size=2, max_size=50, unique=True), other=st.integers(0, 1000))
def test_a_digest_notices_one_sample_in_the_place_of_another(samples: list[int], other: int) -> None:
    if other != samples[0]:
        assert digest(0, np.array([other, *samples[1:]])) != digest(0, np.array(samples))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    """A finished run of two epochs that kept all its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    assert train.main([*config_of(folder, small_shards), "--set", "checkpoint.keep_last=9"]) == 0
    return folder / "run"


def test_an_epoch_writes_what_it_proved(finished: Path) -> None:
    proved = [row for row in rows(finished) if "coverage/ok" in row]
    assert [row["step"] for row in proved] == [4, 8]
    for row in proved:  # 50 images, 4 steps of 12
        numbers = {name: row[f"coverage/{name}"] for name in ("samples", "expected", "replaced", "ok")}
        assert numbers == {"samples": 48, "expected": 48, "replaced": 0, "ok": 1}


def _lost(samples: np.ndarray) -> np.ndarray:
    return samples[:-1]


def _doubled(samples: np.ndarray) -> np.ndarray:
    return np.concatenate([samples[1:2], samples[1:]])  # as many as before: only the hash differs


@pytest.mark.parametrize(("change", "num"), [(_lost, 47), (_doubled, 48)])
def test_a_run_that_loses_or_doubles_a_sample_is_stopped_with_the_numbers(
    small_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[np.ndarray], np.ndarray],
    num: int,
) -> None:
    planned = dataloaders.training_steps

    def faulty(*plan: Any, **part: Any) -> Iterator[tuple[int, int, np.ndarray]]:
        for epoch, step_in_epoch, samples in planned(*plan, **part):
            is_sixth = (epoch, step_in_epoch) == (1, 1)
            yield epoch, step_in_epoch, change(samples) if is_sixth else samples

    monkeypatch.setattr(dataloaders, "training_steps", faulty)
    assert train.main(config_of(tmp_path, small_shards)) == 2
    said = capsys.readouterr().err
    assert f"epoch 1 trained on {num} samples with hash " in said
    assert "the manifest and the plan say 48 with hash " in said
    assert "from a checkpoint of step 4 or earlier" in said
    last = rows(tmp_path / "run")[-1]
    assert (last["step"], last["coverage/samples"], last["coverage/ok"]) == (8, num, 0)
    assert not (tmp_path / "run" / "checkpoints" / "step-00000008").exists()


def test_a_loader_that_reads_another_sample_than_it_was_asked_for_is_noticed(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Loader._fill

    def careless(self: Loader, pending: Any, rows: range) -> Any:
        pending.samples = np.where(pending.samples == 3, 4, pending.samples)
        return asked(self, pending, rows)

    monkeypatch.setattr(Loader, "_fill", careless)
    assert train.main([*config_of(tmp_path, small_shards), "--set", "train.batch_size=50"]) == 2
    assert "epoch 0 trained on 50 samples with hash " in capsys.readouterr().err


@pytest.fixture
def at_step_6(finished: Path, small_shards: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """A copy of the finished run with its newest checkpoint in the middle of the second epoch."""
    shutil.copytree(finished, tmp_path / "run")
    for step in (7, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    return config_of(tmp_path, small_shards), tmp_path / "run"


def test_the_proof_goes_on_in_the_middle_of_an_epoch(at_step_6: tuple[list[str], Path]) -> None:
    arguments, run = at_step_6
    assert train.main(arguments) == 0
    assert [(row["step"], row["coverage/ok"]) for row in rows(run) if "coverage/ok" in row] == [(4, 1), (8, 1)]


def test_a_checkpoint_of_a_version_that_did_not_count_goes_on_and_reports_it(
    at_step_6: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, run = at_step_6

    def age(progress: dict[str, Any]) -> None:
        del progress["covered"]

    edit_progress(run / "checkpoints" / "step-00000006", age)
    assert train.main(arguments) == 0
    assert "epoch 1: its images were not checked" in capsys.readouterr().out
    assert [row["step"] for row in rows(run) if "coverage/ok" in row] == [4]


def test_a_sample_lost_before_a_checkpoint_is_noticed_after_it(
    at_step_6: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, run = at_step_6
    edit_progress(run / "checkpoints" / "step-00000006", lambda p: p["covered"].insert(0, p["covered"].pop(0) - 1))
    assert train.main(arguments) == 2
    assert "epoch 1 trained on 47 samples" in capsys.readouterr().err


def test_another_order_in_the_middle_of_a_run_is_refused(
    at_step_6: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, _ = at_step_6
    assert train.main([*arguments, "--set", "data.block=5", "--set", "data.window=10"]) == 2
    assert "block was 1 and is 5; window was 0 and is 10" in capsys.readouterr().err


def test_block_mode_proves_its_epochs_and_replaced_samples_count_as_themselves(
    small_shards: Path, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    manifest = Manifest.load(shards)
    with SplitReader(manifest, "train") as reader:
        offset = int(reader._index[2]["offset"])
    with (shards / manifest.split("train").shards[0].tar).open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 64)
    order = ["--set", "data.block=4", "--set", "data.window=8", "--set", "train.batch_size=10"]
    assert train.main([*config_of(tmp_path, shards), *order, "--set", "data.max_damaged=5"]) == 0
    proved = [row for row in rows(tmp_path / "run") if "coverage/ok" in row]
    assert "order: blocks of 4, window 8, 10 lanes; judged by its classes" in (tmp_path / "run" / "log.txt").read_text()
    numbers = [(row["coverage/samples"], row["coverage/replaced"], row["coverage/ok"]) for row in proved]
    assert numbers == [(50, 1, 1)] * 2


_FAULTY_SECOND_RANK = """
import os, sys
import narrow
import numpy as np
from wasteddp import train
from wasteddp.data.loader import Loader
asked = Loader._fill
def careless(self, pending, rows):
    if os.environ["RANK"] == "1":
        pending.samples = np.full_like(pending.samples, 7)
    return asked(self, pending, rows)
Loader._fill = careless
narrow.install()
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.processes
def test_a_fault_of_one_rank_ends_them_all(small_shards: Path, tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(_FAULTY_SECOND_RANK)
    done = run_ranks(config_of(tmp_path, small_shards), 2, program=script)
    assert done.stderr.count("error: epoch 0 trained on 48 samples with hash ") == 1
    assert done.returncode == 2
    assert [row["coverage/ok"] for row in rows(tmp_path / "run") if "coverage/ok" in row] == [0]
