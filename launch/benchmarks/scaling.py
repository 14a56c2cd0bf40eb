"""python -m launch.bench scaling: images/s at several numbers of ranks, and the share of communication.

The settings are the same at each number. The global batch is constant, so with more ranks each computes less between
two exchanges of gradients; with `--weak` the work of a rank is constant and the batch grows. The size of the
micro-batches and the CPU threads per rank are constant too: if 4 ranks are the most, one rank uses 2 of 8 cores.

Each run uses the real launcher on drawn images. Some steps warm up, the program's own rows time the next steps, and the
profiler records the last ones. Communication is the part of a step in which ranks communicated and computed nothing:
of the rank with the least (the speed of all ranks) and of the rank with the most (which also waited for other ranks).
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch import ROOT
from launch.benchmarks.datasets import drawn_set
from wasteddp import settings as settings_file
from wasteddp.parallel import num_usable_cores
from wasteddp.settings import Settings
from wasteddp.training.distributed import precision

WARM_STEPS, PROFILED_STEPS, ROW_STEPS = 4, 4, 4


@dataclass(frozen=True, slots=True)
class Found:
    """The result of one run. `communication`: the least and the most communication of its ranks, as parts of a step."""

    step_ms: float
    communication: tuple[float, float]


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("scaling", help="images/s by number of ranks, and the share of communication")
    command.set_defaults(run=compare)
    command.add_argument("--config", default="configs/trashnet-scratch-resnet50.yaml", help="settings of all runs")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--ranks", default="1,2", metavar="1,2,...", help="numbers of processes on this machine")
    command.add_argument("--weak", action="store_true", help="train.batch_size is that of one rank")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--steps", type=int, default=12, help="timed steps of each run")


def compare(arguments: argparse.Namespace) -> None:
    """Run the numbers of ranks in turns, and print a line for each: the medians of the rounds."""
    numbers = sorted({int(number) for number in arguments.ranks.split(",")})
    steps = -(-arguments.steps // ROW_STEPS) * ROW_STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {ranks: _settings(arguments, ranks, max(numbers), steps) for ranks in numbers}
        images = max(run.train.batch_size for run in runs.values())
        shards = drawn_set(folder, num_images=4 * images, size_px=next(iter(runs.values())).data.image_size)
        found: dict[int, list[Found]] = {ranks: [] for ranks in numbers}
        for number in range(arguments.rounds):
            for ranks in numbers if number % 2 == 0 else reversed(numbers):
                found[ranks].append(_run(runs[ranks], ranks, shards, Path(tempfile.mkdtemp(dir=folder))))
    first = runs[numbers[0]]
    threads = f", {first.run.threads} threads each" if first.run.threads else ""
    print(
        f"{first.model.arch}, {first.data.image_size} px, {first.precision}, micro-batches of at most "
        f"{first.train.max_micro_batch}{threads}; median of {arguments.rounds} rounds of {steps} steps, in turns\n"
    )
    print(table(found, {ranks: run.train.batch_size for ranks, run in runs.items()}))


def table(found: dict[int, list[Found]], images: dict[int, int]) -> str:
    """Return a Markdown table by number of ranks. The efficiency of a rank is relative to the smallest number.

    Args:
        images: images per step, by number of ranks.
    """
    rates = {ranks: [1000 * images[ranks] / one.step_ms for one in runs] for ranks, runs in found.items()}
    least = min(found)
    lines = [
        "| ranks | images per step | ms per step | images/s | efficiency | communication |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ranks, runs in found.items():
        efficiency = statistics.median(
            (own / ranks) / (alone / least) for own, alone in zip(rates[ranks], rates[least], strict=True)
        )
        low, high = (statistics.median(one.communication[end] for one in runs) for end in (0, 1))
        lines.append(
            f"| {ranks} | {images[ranks]} | {statistics.median(one.step_ms for one in runs):.1f} | "
            f"{statistics.median(rates[ranks]):.1f} | {efficiency:.1%} | {low:.1%} to {high:.1%} |"
        )
    return "\n".join(lines)


def communication_of(verdict: str) -> tuple[float, float]:
    """Return the least and the most communication of the ranks, read from the profiler's verdict."""
    shares = [float(percent) / 100 for percent in re.findall(r"rank \d+: .*?communication ([\d.]+)%", verdict)]
    return min(shares), max(shares)


def _settings(arguments: argparse.Namespace, ranks: int, most: int, steps: int) -> Settings:
    """Return the settings of the run with `ranks` ranks."""
    asked = settings_file.load(arguments.config, arguments.set)
    batch = asked.train.batch_size * (ranks if arguments.weak else 1)
    of_a_rank = max(1, asked.train.batch_size // (1 if arguments.weak else most))
    fixed = [
        f"train.batch_size={batch}",
        f"train.max_micro_batch={min(asked.train.max_micro_batch or of_a_rank, of_a_rank)}",
        "train.epochs=1000000",
        f"train.stop_at_step={WARM_STEPS + steps + PROFILED_STEPS}",
        f"train.log_every_steps={ROW_STEPS}",
        "evaluate.every_steps=1000000",
        f"profile.skip={WARM_STEPS + steps}",
        f"profile.steps={PROFILED_STEPS}",
        f"precision={precision.without_measuring(asked.precision)}",
        "data.lanes=0",
        "model.weights=none",
        "track.wandb=disabled",
    ]
    if not torch.cuda.is_available() and not asked.run.threads:
        fixed.append(f"run.threads={max(1, num_usable_cores() // most)}")
    return settings_file.parse(asked.to_yaml(), fixed)


def _run(settings: Settings, ranks: int, shards: Path, folder: Path) -> Found:
    """Run one training with the launcher."""
    out, config = folder / "run", folder / "settings.yaml"
    config.write_text(settings.to_yaml())
    program = [
        "wasteddp/train.py",
        "--config",
        str(config),
        "--set",
        f"data.shards={shards}",
        "--set",
        f"run.out={out}",
    ]
    command = [sys.executable, *program]
    if ranks > 1:
        kind = "gpus.yaml" if torch.cuda.is_available() else "cpu2.yaml"
        launcher = ["--config_file", f"launch/accelerate/{kind}", "--num_processes", str(ranks)]
        launcher += ["--main_process_port", str(_free_port())]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launcher, *program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run with {ranks} ranks ended with {done.returncode}:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = settings.profile.skip
    timed = [row["train/step_ms"] for row in rows if WARM_STEPS < row["step"] <= last and "train/step_ms" in row]
    return Found(statistics.mean(timed), communication_of((out / "profile" / "verdict.txt").read_text()))


def _free_port() -> int:
    """Return a free port: another run on this machine may use the port of the launcher's file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
