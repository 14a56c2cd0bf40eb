"""Cooperation with the batch script, slurm/train.sh: marks in the run's folder, and the time limit of the job.

A mark is an empty file. It replaces the exit code, which launchers turn into 1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from wasteddp.errors import LaunchError, WastedError

MISTAKE_MARK = "MISTAKE"  # the run ended with an error that the user must fix: do not start it again


@contextlib.contextmanager
def mistake_marked(out: Path) -> Iterator[None]:
    """Write the mark if the block raises a WastedError. On any rank; only if the folder exists."""
    try:
        yield
    except WastedError:
        with contextlib.suppress(OSError):
            (out / MISTAKE_MARK).touch()
        raise


@dataclass(slots=True)
class Notice:
    """Checks early whether a save fits between the warning of the batch system and its time limit.

    Attributes:
        seconds: time between the two; None without a batch system that warns.
        save_s: time of the first save, until the checkpoint was on disk; 0 before it was measured.
        busy_s: the longest time so far in which the run did not check for signals: a step with its evaluation.
    """

    seconds: float | None
    save_s: float = 0.0
    busy_s: float = 0.0
    _was_asked: bool = False
    _is_enough: bool | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Notice:
        given = environment.get("WASTEDDP_WARNING_S")
        return cls(float(given) if given else None)

    def wants_a_save(self) -> bool:
        """Whether to save now, to measure the time of a save early: true once, if there will be a warning. The same on
        all ranks."""
        wants, self._was_asked = self.seconds is not None and not self._was_asked, True
        return wants

    @property
    def is_measuring(self) -> bool:
        """Whether to wait for the next save, to measure it. The same on all ranks."""
        return self.seconds is not None and not self.save_s

    def comment(self, row: Mapping[str, float]) -> str:
        """Return what to report after a save: a line if the result of the check changed, '' otherwise."""
        self.busy_s = max(self.busy_s, row.get("train/step_ms", 0.0) / 1000 + row.get("val/seconds", 0.0))
        if self.seconds is None or not self.save_s:
            return ""
        needed_s = self.busy_s + 2 * self.save_s  # the previous save may just have started
        is_enough, before = needed_s <= self.seconds, self._is_enough
        self._is_enough = is_enough
        if is_enough == before:
            return ""
        times = (
            f"a checkpoint takes {self.save_s:.1f} s, a step with its evaluation up to {self.busy_s:.1f} s; the batch "
            f"system warns {self.seconds:g} s before its limit, and the run may need {needed_s:.1f} s"
        )
        if is_enough:
            return times
        wanted_s = 60 * math.ceil(2 * needed_s / 60)
        return f"warning: {times}: the last save would not finish. Submit with SBATCH_SIGNAL=B:USR1@{wanted_s}"


def refuse_other_world(environment: Mapping[str, str]) -> None:
    """Refuse to train on fewer nodes than the step of a Slurm job has.

    `srun --nodes=2 accelerate launch train.py` starts a launcher on each node. Without the options for several machines
    each of them silently trains its own model.

    Raises:
        LaunchError: the launcher has fewer nodes than the Slurm step.
    """
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    world_size, here = (int(environment.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if nodes > 1 and world_size != nodes * here:
        raise LaunchError(
            f"Slurm started this step on {nodes} nodes; the launcher has {world_size} process(es), {here} on this node",
            f"{nodes} separate models would be trained and written into the same folder",
            "use `sbatch slurm/train.sh`, or give the launcher --num_machines, --machine_rank and --main_process_ip",
        )
