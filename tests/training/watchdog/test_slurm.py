from __future__ import annotations

from pathlib import Path

import pytest

from wasteddp.errors import LaunchError, SettingsError
from wasteddp.training.watchdog.slurm import MISTAKE_MARK, Notice, mistake_marked, refuse_other_world


def test_something_to_fix_leaves_a_mark_and_a_crash_does_not(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), mistake_marked(tmp_path):
        raise RuntimeError("CUDA error: uncorrectable ECC error")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SettingsError), mistake_marked(tmp_path / "nowhere"):
        raise SettingsError("no folder, no mark")
    with pytest.raises(SettingsError), mistake_marked(tmp_path):
        raise SettingsError("fix it")
    assert [path.name for path in tmp_path.iterdir()] == [MISTAKE_MARK]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},  # without Slurm
        {"SLURM_JOB_NUM_NODES": "2"},  # started by hand on one node of an allocation
        {"SLURM_STEP_NUM_NODES": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
        {"SLURM_STEP_NUM_NODES": "3", "WORLD_SIZE": "24", "LOCAL_WORLD_SIZE": "8"},
    ],
)
def test_a_world_that_is_the_steps_is_taken(environment: dict[str, str]) -> None:
    refuse_other_world(environment)


@pytest.mark.parametrize("world", [{}, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}])
def test_a_launcher_that_does_not_know_of_the_other_nodes_is_refused(world: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"this step on 2 nodes; the launcher has \d process") as error:
        refuse_other_world({"SLURM_STEP_NUM_NODES": "2", **world})
    assert "--machine_rank" in str(error.value)


def row(step_s: float, evaluation_s: float = 0.0) -> dict[str, float]:
    return {"train/step_ms": 1000 * step_s} | ({"val/seconds": evaluation_s} if evaluation_s else {})


def test_a_save_that_fits_before_the_limit_is_reported_once() -> None:
    notice = Notice.of({"WASTEDDP_WARNING_S": "300"})
    assert notice.comment(row(1, 4)) == ""  # no save was measured yet
    notice.save_s = 20
    said = notice.comment(row(1))
    assert said.startswith(
        "a checkpoint takes 20.0 s, a step with its evaluation up to 5.0 s; the batch system warns 300 s"
    )
    assert "the run may need 45.0 s" in said
    notice.save_s = 21
    assert notice.comment(row(1)) == ""


def test_a_save_that_would_be_cut_off_is_a_warning_with_the_signal_to_ask_for() -> None:
    notice = Notice.of({"WASTEDDP_WARNING_S": "300"})
    notice.save_s = 140
    said = notice.comment(row(1, 20))  # 21 + 2 x 140 = 301 s
    assert said.startswith("warning: ")
    assert "SBATCH_SIGNAL=B:USR1@660" in said  # twice 301 s, rounded up to minutes
    notice.save_s = 150
    assert notice.comment(row(1)) == ""
    notice.save_s = 139
    assert notice.comment(row(1)).startswith("a checkpoint")


def test_a_save_is_asked_for_once_and_measured_once() -> None:
    notice = Notice.of({"WASTEDDP_WARNING_S": "300"})
    assert [notice.wants_a_save() for _ in range(3)] == [True, False, False]
    assert notice.is_measuring
    notice.save_s = 0.1
    assert not notice.is_measuring


def test_without_a_batch_system_nothing_is_printed_or_requested() -> None:
    notice = Notice.of({})
    notice.save_s = 1000
    assert notice.comment(row(1000)) == ""
    assert not notice.wants_a_save()
    assert not Notice.of({}).is_measuring
