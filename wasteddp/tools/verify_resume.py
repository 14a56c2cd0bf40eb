"""`wasteddp verify-resume`: trains twice, once undisturbed and once killed again and again, and compares step by step.

The ranks are started without a launcher, which would clean up after a kill. No torch here.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wasteddp import settings as settings_file
from wasteddp.errors import EXIT_FINISHED, EXIT_RESUMABLE, CheckpointError, SettingsError, storage
from wasteddp.files import read_rows
from wasteddp.settings import Settings
from wasteddp.training.distributed.ranks import Ranks

_POLL_S = 0.02
_LONGEST_DELAY_S = 0.5


@dataclass(frozen=True, slots=True)
class Kill:
    """One interruption, as planned and as it came."""

    attempt: int
    processes: int
    signal: str
    at_step: int  # sent once this many steps were done and `delay_s` had passed
    delay_s: float
    steps_done: int  # when it was sent; what is above the next start's checkpoint was done again
    exit_codes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """What `wasteddp verify-resume` found; `receipt.json` is this."""

    seed: int
    processes: tuple[int, ...]
    precision: str
    deterministic: bool  # run.deterministic, of both runs
    kills: tuple[Kill, ...]
    rows: tuple[dict[str, Any], ...]  # a step each: both runs side by side
    final_weights: tuple[str, str]  # of all tensors, running statistics too: undisturbed, interrupted
    same_samples: bool
    same_weights: bool
    largest_loss_difference: float  # relative

    @property
    def holds(self) -> bool:
        """Samples and images must be the same at any number of processes; weights at the same number."""
        return self.same_samples and (self.same_weights or len(set(self.processes)) > 1)


def prove(
    config: str,
    overrides: Sequence[str],
    *,
    steps: int,
    kills: int,
    processes: Sequence[int],
    seed: int,
    out: Path,
    say: Callable[[str], None],
    deterministic: bool = False,
) -> Proof:
    """Trains undisturbed at `processes[0]`, then with `kills` interruptions at each of `processes` in turn.

    Args:
        steps: of either training.
        seed: of the moments and the signals.
        out: folder for both runs and receipt.json; the runs are removed if the proof holds.
        deterministic: run.deterministic of both, where the overrides leave it open.

    Raises:
        SettingsError: a configuration that no run could have, or fewer steps than kills.
        CheckpointError: a training ended in another way than it should.
    """
    if kills >= steps:
        raise SettingsError(
            f"{kills} kills and {steps} steps", "there is one kill at most after a step", "raise --steps"
        )
    fixed = [*(["run.deterministic=true"] if deterministic else []), *overrides, *_fixed(steps)]
    settings = settings_file.load(config, fixed)
    shutil.rmtree(out, ignore_errors=True)
    with storage("making the folder", out):
        out.mkdir(parents=True)
    draws = random.Random(seed)
    moments = sorted(draws.sample(range(1, steps), kills))
    say(f"seed {seed}: undisturbed with {processes[0]} process(es), {steps} steps")
    undisturbed, interrupted = out / "undisturbed", out / "interrupted"
    _finish(Ranks.started(_arguments(config, fixed, undisturbed), processes[0], undisturbed))
    done = []
    for number, moment in enumerate(moments, start=1):
        ranks = Ranks.started(
            _arguments(config, fixed, interrupted), processes[(number - 1) % len(processes)], interrupted
        )
        name, delay_s = draws.choice(["SIGKILL", "SIGTERM"]), draws.uniform(0, _LONGEST_DELAY_S)
        done.append(_kill(ranks, interrupted, number, moment, name, delay_s))
        say(f"attempt {number}: {done[-1].processes} process(es), {name} after step {done[-1].steps_done}")
    _finish(Ranks.started(_arguments(config, fixed, interrupted), processes[kills % len(processes)], interrupted))
    proof = compare(undisturbed, interrupted, settings=settings, seed=seed, processes=tuple(processes), kills=done)
    with storage("writing the receipt", out):
        (out / "receipt.json").write_text(json.dumps(asdict(proof) | {"holds": proof.holds}, indent=1))
        if proof.holds:
            shutil.rmtree(undisturbed)
            shutil.rmtree(interrupted)
    return proof


def compare(
    undisturbed: Path,
    interrupted: Path,
    *,
    settings: Settings,
    seed: int,
    processes: tuple[int, ...],
    kills: Sequence[Kill],
) -> Proof:
    """Both runs' steps side by side."""
    ours, theirs = _steps(interrupted), _steps(undisturbed)
    rows = []
    for step in sorted(ours.keys() | theirs.keys()):
        then, now = theirs.get(step, {}), ours.get(step, {})
        row: dict[str, Any] = {"step": step}
        for name in ("samples", "images", "train/loss", "weights"):
            row[name] = [then.get(name), now.get(name)]
        rows.append(row)
    losses = [row["train/loss"] for row in rows if None not in row["train/loss"]]
    weights = (_final_weights(undisturbed), _final_weights(interrupted))
    return Proof(
        seed=seed,
        processes=processes,
        precision=settings.precision,
        deterministic=settings.run.deterministic,
        kills=tuple(kills),
        rows=tuple(rows),
        final_weights=weights,
        same_samples=bool(rows) and all(row[n][0] == row[n][1] for row in rows for n in ("samples", "images")),
        same_weights=weights[0] == weights[1] and all(row["weights"][0] == row["weights"][1] for row in rows),
        largest_loss_difference=max((abs(a - b) / max(abs(a), 1e-12) for a, b in losses), default=0.0),
    )


def _kill(ranks: Ranks, run: Path, attempt: int, at_step: int, name: str, delay_s: float) -> Kill:
    while ranks.are_running and _last_step(run) < at_step:
        time.sleep(_POLL_S)
    time.sleep(delay_s)
    steps_done = _last_step(run)
    ranks.send(signal.Signals[name])
    codes = ranks.wait()
    allowed = {EXIT_FINISHED, EXIT_RESUMABLE} if name == "SIGTERM" else {EXIT_FINISHED, -signal.SIGKILL}
    if set(codes) - allowed:
        raise _unexpected(ranks, f"{name} after step {steps_done}", codes)
    return Kill(attempt, len(codes), name, at_step, round(delay_s, 3), steps_done, codes)


def _finish(ranks: Ranks) -> None:
    codes = ranks.wait()
    if set(codes) != {EXIT_FINISHED}:
        raise _unexpected(ranks, "no signal", codes)


def _unexpected(ranks: Ranks, what: str, codes: tuple[int, ...]) -> CheckpointError:
    log = ranks.log
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    return CheckpointError(
        f"after {what} the training ended with exit codes {list(codes)}: {' / '.join(said)}",
        "nothing can be said about its resuming",
        f"see {log}",
    )


def _fixed(steps: int) -> list[str]:
    return [
        "run.record_steps=true",
        "train.log_every_steps=1",
        f"train.stop_at_step={steps}",
        f"checkpoint.every_steps={max(1, steps // 5)}",
        "track.wandb=disabled",
    ]


def _arguments(config: str, overrides: Sequence[str], run: Path) -> list[str]:
    return ["--config", config, *(part for o in (*overrides, f"run.out={run}") for part in ("--set", o))]


def _last_step(run: Path) -> int:
    steps = list(read_rows(run / "steps.jsonl", "step"))
    return int(steps[-1]["step"]) if steps else 0


def _steps(run: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for row in (*read_rows(run / "steps.jsonl", "step"), *read_rows(run / "metrics.jsonl", "step")):
        found.setdefault(row["step"], {}).update(row)
    return found


def _final_weights(run: Path) -> str:
    complete = sorted((run / "checkpoints").glob("step-*/complete.json"))[-1]
    sha256: str = json.loads(complete.read_text())["sha256"]["model.safetensors"]
    return sha256
