"""What a run knows of the batch job it is in, and what it leaves for the job's script: see slurm/train.sh.

A mark is an empty file in the run's folder, since launchers replace every exit code by 1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from wasteddp.errors import LaunchError, WastedError

MISTAKE_MARK = "MISTAKE"  # ended with a message that says what to fix: starting it again would only repeat it


@contextlib.contextmanager
def mistake_marked(out: Path) -> Iterator[None]:
    """Leaves the mark if the block ends with something to fix; any rank may, the folder must be there."""
    try:
        yield
    except WastedError:
        with contextlib.suppress(OSError):
            (out / MISTAKE_MARK).touch()
        raise


@dataclass(slots=True)
class Notice:
    """Whether a save fits between the batch system's warning and its limit, looked at before it must.

    Attributes:
        seconds: between the two; None where no batch system is known to warn.
        save_s: of the first save, until the checkpoint was on the disk; 0 as long as none was measured.
        busy_s: the longest so far that the run did not look for signals: a step with its evaluation.
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
        """Once, where a warning will come: to know early how long a save takes. The same on all ranks."""
        wants, self._was_asked = self.seconds is not None and not self._was_asked, True
        return wants

    @property
    def is_measuring(self) -> bool:
        """Whether the next save is to be waited for. The same on all ranks."""
        return self.seconds is not None and not self.save_s

    def comment(self, row: Mapping[str, float]) -> str:
        """What is to be said at a save's row of metrics: once, and again when it is no longer true; '' otherwise."""
        self.busy_s = max(self.busy_s, row.get("train/step_ms", 0.0) / 1000 + row.get("val/seconds", 0.0))
        if self.seconds is None or not self.save_s:
            return ""
        needed_s = self.busy_s + 2 * self.save_s  # the save before may just have begun
        is_enough, before = needed_s <= self.seconds, self._is_enough
        self._is_enough = is_enough
        if is_enough == before:
            return ""
        said = (
            f"a checkpoint takes {self.save_s:.1f} s, a step with its evaluation up to {self.busy_s:.1f} s; the batch "
            f"system warns {self.seconds:g} s before its limit, {needed_s:.1f} s of which may be needed"
        )
        if is_enough:
            return said
        wanted_s = 60 * math.ceil(2 * needed_s / 60)
        return f"warning: {said}: the last save would be cut off. Submit with SBATCH_SIGNAL=B:USR1@{wanted_s}"


def refuse_other_world(environment: Mapping[str, str]) -> None:
    """Refuses to train on fewer nodes than the step of a Slurm job has.

    `srun --nodes=2 accelerate launch train.py` starts a launcher on each node, and unless it is told of the other one
    each trains a model of its own, without a word.

    Raises:
        LaunchError: the launcher's world is not that of the step.
    """
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    world_size, here = (int(environment.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if nodes > 1 and world_size != nodes * here:
        raise LaunchError(
            f"Slurm started this step on {nodes} nodes; the launcher knows of {world_size} process(es), {here} here",
            f"{nodes} models would be trained apart from each other into the same folder",
            "use `sbatch slurm/train.sh`, or give the launcher --num_machines, --machine_rank and --main_process_ip",
        )
