"""`wasteddp verify-resume`: train twice, once undisturbed and once with kills, and compare both runs step by step.

The ranks are started without a launcher, which would clean up after a kill. This module does not import torch.
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

from rich.console import Console
from rich.table import Table

from wasteddp import settings as settings_file
from wasteddp.errors import EXIT_FINISHED, EXIT_RESUMABLE, CheckpointError, SettingsError, storage
from wasteddp.files import read_rows
from wasteddp.training.distributed.launcher import Processes

_POLL_S = 0.02
_LONGEST_DELAY_S = 0.5
_WIDTH = 110  # characters: without a terminal rich uses 80, and would cut the hashes
_ADVICE = (
    "; a GPU's kernels, and three processes or more, add in a fixed order only with run.deterministic: run the same "
    "command with --set run.deterministic=true"
)
_DIGITS = 8  # of a hash, in the table; the receipt has all


@dataclass(frozen=True, slots=True)
class Kill:
    """One interruption: the plan and the result."""

    attempt: int
    processes: int
    signal: str
    at_step: int  # sent after this many steps and `delay_s`
    delay_s: float
    steps_done: int  # when it was sent; steps after the next start's checkpoint were repeated
    exit_codes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of `wasteddp verify-resume`, written to `receipt.json`."""

    seed: int
    processes: tuple[int, ...]
    precision: str
    deterministic: bool  # run.deterministic of both runs
    kills: tuple[Kill, ...]
    rows: tuple[dict[str, Any], ...]  # one per step, with both runs
    final_weights: tuple[str, str]  # of all tensors, with running statistics: undisturbed, interrupted
    same_samples: bool
    same_weights: bool
    largest_loss_difference: float  # relative

    @property
    def holds(self) -> bool:
        """Samples and images must be the same at any number of processes, weights only at one number."""
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
    """Train undisturbed at `processes[0]`, then with `kills` interruptions at each of `processes` in turn.

    Args:
        steps: steps of each training.
        seed: seed of the moments and the signals.
        out: folder for both runs and receipt.json; the runs are removed if the proof holds.
        deterministic: run.deterministic of both runs, unless the overrides set it.

    Raises:
        SettingsError: the configuration is invalid, or there are as many kills as steps or more.
        CheckpointError: a training ended with an unexpected exit code.
    """
    if kills >= steps:
        raise SettingsError(
            f"{kills} kills and {steps} steps", "there can be only one kill per step", "raise --steps or lower --kills"
        )
    fixed = [*(["run.deterministic=true"] if deterministic else []), *overrides, *_fixed(steps)]
    settings = settings_file.load(config, fixed)
    shutil.rmtree(out, ignore_errors=True)
    with storage("creating the folder", out):
        out.mkdir(parents=True)
    draws = random.Random(seed)
    moments = sorted(draws.sample(range(1, steps), kills))
    say(f"seed {seed}: undisturbed with {processes[0]} process(es), {steps} steps")
    undisturbed, interrupted = out / "undisturbed", out / "interrupted"
    _finish(Processes.start(_arguments(config, fixed, undisturbed), processes[0], undisturbed))
    done = []
    for number, moment in enumerate(moments, start=1):
        ranks = Processes.start(
            _arguments(config, fixed, interrupted), processes[(number - 1) % len(processes)], interrupted
        )
        name, delay_s = draws.choice(["SIGKILL", "SIGTERM"]), draws.uniform(0, _LONGEST_DELAY_S)
        done.append(_kill(ranks, interrupted, number, moment, name, delay_s))
        say(f"attempt {number}: {done[-1].processes} process(es), {name} after step {done[-1].steps_done}")
    _finish(Processes.start(_arguments(config, fixed, interrupted), processes[kills % len(processes)], interrupted))
    proof = compare(
        undisturbed,
        interrupted,
        precision=settings.precision,
        deterministic=settings.run.deterministic,
        seed=seed,
        processes=tuple(processes),
        kills=done,
    )
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
    precision: str,
    deterministic: bool,
    seed: int,
    processes: tuple[int, ...],
    kills: Sequence[Kill],
) -> Proof:
    """Compare the steps of both runs."""
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
        precision=precision,
        deterministic=deterministic,
        kills=tuple(kills),
        rows=tuple(rows),
        final_weights=weights,
        same_samples=bool(rows) and all(row[n][0] == row[n][1] for row in rows for n in ("samples", "images")),
        same_weights=weights[0] == weights[1] and all(row["weights"][0] == row["weights"][1] for row in rows),
        largest_loss_difference=max((abs(a - b) / max(abs(a), 1e-12) for a, b in losses), default=0.0),
    )


def _kill(ranks: Processes, run: Path, attempt: int, at_step: int, name: str, delay_s: float) -> Kill:
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


def _finish(ranks: Processes) -> None:
    codes = ranks.wait()
    if set(codes) != {EXIT_FINISHED}:
        raise _unexpected(ranks, "no signal", codes)


def _unexpected(ranks: Processes, what: str, codes: tuple[int, ...]) -> CheckpointError:
    log = ranks.log
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    return CheckpointError(
        f"after {what} the training ended with exit codes {list(codes)}: {' / '.join(said)}",
        "its resume cannot be judged",
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


def show(proof: Proof, out: Path) -> None:
    """Print the proof: the kills, both runs step by step, and a verdict."""
    console = Console()
    console = Console(width=max(console.width, _WIDTH))
    kills = Table("attempt", "processes", "signal", "after step", "exit codes", title="kills")
    for kill in proof.kills:
        codes = " ".join(map(str, kill.exit_codes))
        kills.add_row(str(kill.attempt), str(kill.processes), kill.signal, str(kill.steps_done), codes)
    console.print(kills)
    steps = Table(title="step by step: undisturbed | interrupted")
    for name in ("step", "samples", "images", "loss", "weights"):
        steps.add_column(name, no_wrap=True)
    for row in proof.rows:
        hashes = {name: _side_by_side(row[name]) for name in ("samples", "images", "weights")}
        losses = _side_by_side([value if value is None else f"{value:.6f}" for value in row["train/loss"]])
        steps.add_row(str(row["step"]), hashes["samples"], hashes["images"], losses, hashes["weights"])
    console.print(steps)
    if proof.deterministic:
        console.print("run.deterministic: kernels and ranks add in a fixed order, in both runs")
    console.print(f"samples and images: {'the same in every step' if proof.same_samples else 'NOT the same'}")
    weights = "the same, bit for bit" if proof.same_weights else "not the same"
    console.print(
        f"weights: {weights} ({proof.final_weights[0][:_DIGITS]} | {proof.final_weights[1][:_DIGITS]}); "
        f"losses differ by {proof.largest_loss_difference:.1e} at most"
    )
    if len(set(proof.processes)) > 1:
        console.print("at different numbers of processes sums are rounded differently: weights are not compared")
    console.print(f"receipt: {out / 'receipt.json'}", soft_wrap=True)


def refuse(proof: Proof, out: Path) -> None:
    """If the proof does not hold, raise a CheckpointError that names the first difference."""
    if proof.holds:
        return
    names = ("samples", "images") if not proof.same_samples else ("weights",)
    differing = (row["step"] for row in proof.rows if any(row[n][0] != row[n][1] for n in names))
    first = next(differing, None)
    where = f"in step {first}" if first else "in the statistics at the end"
    raise CheckpointError(
        f"the {' or '.join(names)} of the interrupted and the undisturbed run differ, first {where}",
        "a killed run would not end like an undisturbed one",
        f"compare {out / 'undisturbed'} with {out / 'interrupted'}"
        + ("" if proof.deterministic or not proof.same_samples else _ADVICE),
    )


def _side_by_side(values: list[str | None]) -> str:
    then, now = (value[:_DIGITS] if value else "none" for value in values)
    return f"{then} = {now}" if values[0] == values[1] else f"{then} ≠ {now}"
