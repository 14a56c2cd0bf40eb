"""Disturb trainings a given number of times, and print the results as a table.

python -m tests.chaos --kills 200 --seed 0       forked processes
python -m tests.chaos --launchers 20 --seed 0    processes of accelerate launch and torchrun
python -m tests.chaos --power-loss 200           power cuts, from recorded file operations
python -m tests.chaos --every-nth                faults of the first, second, third ... call
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before the import of numpy and torch: no threads may exist before the forks

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.sources import synthetic

from . import disk, every_nth, launchers, power
from .events import KINDS
from .harness import Record, disturb_many
from .programs import NAMES, make_programs
from .results import Results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="events, with faults (default: 200, or 0 with --launchers)")
    parser.add_argument("--launchers", type=int, default=0, help="signals to real launchers and their ranks")
    parser.add_argument("--only", default="", choices=KINDS, help="kind of the events of --kills")
    parser.add_argument("--power-loss", type=int, default=0, metavar="POINTS", help="power cuts")
    parser.add_argument("--every-nth", action="store_true", help="a fault at every call; with --out in pieces")
    parser.add_argument("--share", type=float, default=1.0, help="fraction of the faults of --every-nth to test")
    names = ", ".join(NAMES)
    parser.add_argument(
        "--programs", nargs="*", default=NAMES, choices=NAMES, metavar="NAME", help=f"of those: {names}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="start no event after this time (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder to keep; results are appended to its results.jsonl")
    arguments = parser.parse_args()
    on_disk = arguments.power_loss or arguments.every_nth
    if on_disk:
        disk.load_again()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        out = arguments.out or Path(temporary)
        began = time.monotonic()
        how = {
            "seed": arguments.seed,
            "say": lambda line: print(line, flush=True),
            "until": lambda: time.monotonic() > began + 60 * arguments.minutes,
        }
        if on_disk:
            _fail_disks(out, arguments, **how)
            return
        shards = make_small_shards(out)
        kills = (0 if arguments.launchers else 200) if arguments.kills is None else arguments.kills
        if kills:
            trainings = disturb_many(out, shards, events=kills, only=arguments.only, **how)
            records = [record for training in trainings for record in training.records]
            results = [(one.event.name, one.ended, one.steps_lost, one.outcome.had_to_kill) for one in records]
            _report(out, table(records), results, len(trainings), began)
        if arguments.launchers:
            began_launching = time.monotonic()
            shots = launchers.disturb_launched(out, shards, events=arguments.launchers, **how)
            results = [(f"{one.shot.signal}: {one.shot.name}", one.outcome, one.steps_lost, 0) for one in shots]
            _report(out, launchers.table(shots), results, len({one.training for one in shots}), began_launching)


def _fail_disks(out: Path, arguments: argparse.Namespace, **how: Any) -> None:
    programs = {name: one for name, one in make_programs(out).items() if name in arguments.programs}
    results = Results(out / ("power.jsonl" if arguments.power_loss else "every-nth.jsonl"))
    began = time.monotonic()
    if arguments.power_loss:
        power.cut_power(programs, results, points=arguments.power_loss, **how)
    else:
        every_nth.fail_every_nth(programs, results, share=arguments.share, **how)
    rows = power.WAYS if arguments.power_loss else every_nth.FAULTS
    print(results.table(rows, programs))
    print(
        f"{results.num} points, {time.monotonic() - began:.0f} s: every program ended as the undisturbed one, none lost"
    )


def _report(out: Path, lines: str, results: list[tuple[str, str, int, int]], trainings: int, began: float) -> None:
    with (out / "results.jsonl").open("a") as file:
        file.write("".join(f"{json.dumps(result)}\n" for result in results))
    print(lines)
    print(
        f"{len(results)} events in {trainings} trainings, {time.monotonic() - began:.0f} s: "
        "every training ended as the undisturbed one; remaining ranks that had to be killed: "
        f"{sum(had_to_kill for *_, had_to_kill in results)}"
    )


def make_small_shards(out: Path) -> Path:
    """Draw 100 training images in 3 classes: 8 steps per epoch, and 4 images that each epoch leaves out."""
    if not (out / "shards" / "manifest.json").exists():
        kinds = synthetic.KINDS[:3]
        for split, count, seed in (("train", 34, 1), ("val", 5, 2)):
            synthetic.draw_folder(out / "images" / split, kinds=kinds, images_per_class=count, size_px=48, seed=seed)
        for extra in sorted((out / "images" / "train").rglob("*.*"))[:2]:
            extra.unlink()
        make_shards(Job(out / "images", out / "shards", Options(shard_mb=0.05)), workers=1)
    return out / "shards"


def table(records: list[Record]) -> str:
    """Return a Markdown table with a row for each kind of event."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.event.name].append(record)
    lines = [
        "| event | processes | times | how the attempt ended | repeated steps: median, most |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, group in sorted(groups.items()):
        counts = Counter(record.ended for record in group)
        ended = ", ".join(f"{count} {word}" for word, count in counts.most_common())
        numbers = sorted({record.event.processes for record in group})
        lost = [record.steps_lost for record in group]
        lines.append(
            f"| {name} | {' or '.join(map(str, numbers))} | {len(group)} | {ended} "
            f"| {statistics.median(lost):g}, {max(lost)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
