"""Benchmarks that anybody can run. Each compares in one run, interleaved, and prints medians.

    python -m launch.bench step       the model's step alone, on images in memory, beside timm's and torchvision's loops
    python -m launch.bench train      images/s of the real training program beside a bare loop on tensors in memory
    python -m launch.bench loader     images/s of the loader beside torchvision's, webdataset and decoding alone
    python -m launch.bench checks     what all checks of a training cost, as a share of a step
    python -m launch.bench checkpoint the loop's wait for a save beside a copy in memory; --starts 3: resumed starts
    python -m launch.bench scaling    images/s with ranks through the launcher, and the share of communication

The first line says on what they ran. Read the ratio; the figures themselves are the machine's. Leave the machine alone
meanwhile: a second busy process on two cores can cost either side most of its speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from launch import bench_checkpoint, bench_loader, bench_scaling, bench_step
from launch.machine import headline
from wasteddp import settings as settings_file

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="the training program beside a bare loop")
    train.add_argument("--config", default="configs/trashnet-scratch-resnet50.yaml", help="settings of both sides")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    train.add_argument("--rounds", type=int, default=3)
    train.add_argument("--steps", type=int, default=30, help="timed steps a round, behind 10 that are not")
    loader = commands.add_parser("loader", help="the loader beside others on the same JPEGs")
    loader.add_argument("--shards", default="shards/trashnet", help="set whose training images all sides read")
    loader.add_argument("--rounds", type=int, default=3)
    loader.add_argument("--seconds", type=float, default=4.0, help="timed of each side in each round")
    checks = commands.add_parser("checks", help="what all checks of a training cost, as a share of a step")
    checks.add_argument("--config", default="configs/trashnet-scratch-resnet50.yaml")
    checks.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    checks.add_argument("--rounds", type=int, default=20, help="timed steps; each check is timed ten times as often")
    bare = commands.add_parser("bare")  # one side of `train`, in a process of its own
    bare.add_argument("settings")
    bare.add_argument("steps", type=int)
    for module in (bench_checkpoint, bench_step, bench_scaling):
        module.add(commands)
    arguments = parser.parse_args()
    if arguments.command == "bare":
        print(json.dumps(bare_loop(arguments.settings, arguments.steps)))
        return
    print(headline() + "\n", flush=True)
    if arguments.command == "step":
        bench_step.compare(arguments)
    elif arguments.command == "scaling":
        bench_scaling.compare(arguments)
    elif arguments.command == "loader":
        bench_loader.compare(arguments.shards, arguments.rounds, arguments.seconds)
    elif arguments.command == "checks":
        from launch import bench_checks

        bench_checks.main(arguments.config, arguments.set, arguments.rounds)
    elif arguments.command == "checkpoint":
        bench_checkpoint.compare(arguments)
    else:
        compare_train(arguments.config, arguments.set, arguments.rounds, arguments.steps)


def compare_train(config: str, overrides: list[str], rounds: int, steps: int) -> None:
    """Alternates the two sides, each in a fresh process, and prints a line a round and the medians."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list[float]] = {"bare": [], "program": []}
        for number in range(1, rounds + 1):
            sides = [("bare", _bare_side), ("program", _program_side)]
            for name, side in sides if number % 2 else reversed(sides):
                found[name].append(side(config, overrides, steps, Path(folder)))
            ratio = found["program"][-1] / found["bare"][-1]
            print(
                f"round {number}: bare loop {found['bare'][-1]:.1f}, program {found['program'][-1]:.1f} images/s, "
                f"ratio {ratio:.3f}",
                flush=True,
            )
    ratios = [program / bare for program, bare in zip(found["program"], found["bare"], strict=True)]
    print(
        f"median of {rounds}: bare loop {statistics.median(found['bare']):.1f}, program "
        f"{statistics.median(found['program']):.1f} images/s; median ratio {statistics.median(ratios):.3f}"
    )


def _arguments(config: str, overrides: list[str], steps: int, folder: Path) -> list[str]:
    fixed = [f"run.out={folder / 'run'}", "track.wandb=disabled", "train.log_every_steps=10"]
    fixed += [f"evaluate.every_steps={steps + 20}"]  # no evaluation and no checkpoint inside the timed steps
    return ["--config", config, *(part for override in [*overrides, *fixed] for part in ("--set", override))]


def _bare_side(config: str, overrides: list[str], steps: int, folder: Path) -> float:
    path = folder / "settings.yaml"
    path.write_text(settings_file.load(config, overrides).to_yaml())
    command = [sys.executable, "-m", "launch.bench", "bare", str(path), str(steps)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _program_side(config: str, overrides: list[str], steps: int, folder: Path) -> float:
    """The real program, stopped by a signal once the steps are done; the mean of its rows, without the first."""
    command = [sys.executable, "wasteddp/train.py", *_arguments(config, overrides, steps, folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"step {steps + 10}/"):
                process.terminate()
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    for path in sorted((folder / "run").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    # ms a step, not images/s of the first rows: the first ten steps allocate and tune
    steps_ms = [row["train/step_ms"] for row in rows if 10 < row["step"] <= steps + 10]
    batch = settings_file.load(config, overrides).train.batch_size
    return float(batch / (statistics.mean(steps_ms) / 1000))


def bare_loop(settings_path: str, steps: int) -> float:
    """images/s of forward, backward and step on one random batch in memory: no loader, no log, nothing around it."""
    from wasteddp.training.runtime import MOST_UNTRIED

    settings = settings_file.load(settings_path)
    size = settings.train.max_micro_batch or MOST_UNTRIED
    alone = settings_file.parse(settings.to_yaml(), [f"train.batch_size={size}", "data.lanes=0"])
    return bench_step.rate("bare loop", alone, steps=steps, warm=10)


if __name__ == "__main__":
    main()
