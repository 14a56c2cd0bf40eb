"""What `wasteddp verify-resume` prints: both runs side by side, the kills, and a verdict."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from wasteddp.errors import CheckpointError
from wasteddp.tools.verify_resume import Proof

_WIDTH = 110  # characters: where there is no terminal rich takes 80, and would cut the hashes
_ADVICE = (
    "; a GPU's kernels, and three processes or more, add in a fixed order only with run.deterministic: give the same "
    "command with --set run.deterministic=true"
)
_DIGITS = 8  # of a hash, in the table; the receipt has more


def show(proof: Proof, out: Path) -> None:
    """Prints the receipt."""
    console = Console()
    console = Console(width=max(console.width, _WIDTH))
    kills = Table("attempt", "processes", "signal", "after step", "exit codes", title="killed")
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
    """Raises a CheckpointError that names the first difference, if the proof does not hold."""
    if proof.holds:
        return
    names = ("samples", "images") if not proof.same_samples else ("weights",)
    differing = (row["step"] for row in proof.rows if any(row[n][0] != row[n][1] for n in names))
    first = next(differing, None)
    where = f"in step {first}" if first else "in the statistics at the end"
    raise CheckpointError(
        f"the interrupted run has other {' or '.join(names)} than the undisturbed one, first {where}",
        "a run that is killed would not end like one that is not",
        f"compare {out / 'undisturbed'} with {out / 'interrupted'}"
        + ("" if proof.deterministic or not proof.same_samples else _ADVICE),
    )


def _side_by_side(values: list[str | None]) -> str:
    then, now = (value[:_DIGITS] if value else "none" for value in values)
    return f"{then} = {now}" if values[0] == values[1] else f"{then} ≠ {now}"
