"""The order of samples at the scale of large clusters: arithmetic only, on one machine.

    python -m launch.simulate order          every rank of a large cluster: coverage, balance, shards and bytes per node
    python -m launch.simulate rank           time and memory of the plan of one rank
    python -m launch.simulate seek           time to compute a step in the middle of a training
    python -m launch.simulate first-batch    time from opening a large set to its first batch of decoded images

`order` computes each sample of each rank, as the ranks would, and hashes them. For a billion samples this takes one
core half a minute to three minutes per order; `--samples` and `--ranks` make it smaller. Each command prints its
measurements.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wasteddp.order import plan_quality
from wasteddp.order.coverage import digest, digest_of_range, to_signed
from wasteddp.order.plan import TrainPlan

RANKS_PER_NODE = 8
COLUMNS = (
    "block / window / lanes per rank",
    "each sample once",
    "samples per rank",
    "shards per node",
    "bytes per node, relative to its share",
    "shards that a node reads within 10 steps",
    "worst-case worth of a batch, of 10",
    "seconds of one core, peak memory of a process",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("order", "rank", "seek", "first-batch"):
        command = commands.add_parser(name)
        command.add_argument("--samples", type=int, default=10**6 if name in ("seek", "first-batch") else 10**9)
        if name in ("order", "rank"):
            command.add_argument("--ranks", type=int, default=4096)
            command.add_argument("--batch", type=int, default=64, help="samples per rank and step")
            command.add_argument("--shard", type=int, default=10_000, help="samples per shard")
    commands.choices["order"].add_argument(
        "--orders",
        default="1,1000,10000,100000",
        help="block sizes, or block/window/lanes per rank, such as 10000/100000/4",
    )
    arguments = parser.parse_args()
    if arguments.command == "order":
        print_orders(arguments)
    elif arguments.command == "rank":
        print_rank(arguments)
    elif arguments.command == "seek":
        print_seek(arguments.samples)
    else:
        print_first_batch(arguments.samples)


def plan_of(order: str, *, samples: int, ranks: int, batch: int, shard: int) -> TrainPlan:
    """Return the plan of "block" or "block/window/lanes per rank". All shards have one size, except the last."""
    block, window, lanes = (int(part) for part in (order.split("/") + ["0", str(batch)][order.count("/") :])[:3])
    full, rest = divmod(samples, shard)
    return TrainPlan(samples, ranks * batch, 0, ranks * lanes, block, window, (shard,) * full + (rest,) * (rest > 0))


# --- every rank -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """The samples of some ranks in an epoch, as sums."""

    samples: int
    digest: int
    least: int  # samples of the rank with the fewest
    most: int


def walk(plan: TrainPlan, ranks: range, world_size: int, epoch: int = 0) -> Part:
    """Compute every sample of some ranks, as each rank computes its own."""
    counts, total = [], 0
    for rank in ranks:
        samples = plan.rank_samples(epoch, rank=rank, world_size=world_size)
        counts.append(len(samples))
        total += digest(plan.seed, samples)
    return Part(sum(counts), to_signed(total), min(counts), max(counts))


def covers(plan: TrainPlan, parts: list[Part], epoch: int = 0) -> bool:
    """Return whether count and hash are those of all samples except the ones that the epoch leaves out."""
    expected = digest_of_range(plan.seed, 0, plan.num_samples) - digest(plan.seed, plan.left_out_samples(epoch))
    seen = to_signed(sum(part.digest for part in parts))
    return (sum(part.samples for part in parts), seen) == (
        plan.steps_per_epoch * plan.global_batch,
        to_signed(expected),
    )


def print_orders(arguments: argparse.Namespace) -> None:
    sizes = {name: getattr(arguments, name) for name in ("samples", "ranks", "batch", "shard")}
    nodes = max(1, arguments.ranks // RANKS_PER_NODE)
    share = arguments.samples / nodes / arguments.shard
    print(
        f"{arguments.samples:,} samples, {arguments.ranks:,} ranks on {nodes:,} nodes, shards of {arguments.shard:,}: "
        f"a node's share is {share:.1f} shards\n"
    )
    print(f"| {' | '.join(COLUMNS)} |")
    print("| --- " * len(COLUMNS) + "|")
    cores = len(os.sched_getaffinity(0))
    for order in arguments.orders.split(","):
        plan = plan_of(order, **sizes)
        began = _core_seconds()
        step = max(1, arguments.ranks // (32 * cores))
        work = [range(at, min(at + step, arguments.ranks)) for at in range(0, arguments.ranks, step)]
        with ProcessPoolExecutor(cores) as pool:
            parts = list(pool.map(partial(_walk_order, order, sizes), work))
        proved = covers(plan, parts)
        seconds = _core_seconds() - began
        looked_at = sorted({nodes * number // 16 for number in range(16)})
        found = plan_quality.measure_traffic(plan, plan.shard_samples, num_nodes=nodes, nodes=looked_at)
        worth = plan_quality.measure_shuffle(plan)
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        balance = f"{min(p.least for p in parts):,} to {max(p.most for p in parts):,}"
        print(
            f"| {plan.block:,} / {plan.window:,} / {plan.lanes // arguments.ranks} | {'yes' if proved else 'NO'}, "
            f"{plan.left_out_per_epoch:,} left out | {balance} | {found.most_shards:,} | {found.fetched:.2f} | "
            f"{found.at_once:,} | {worth.batch:.2f}, {worth.recent:.2f} | {seconds:.0f}, {peak / 1024:.0f} MB |",
            flush=True,
        )


def _core_seconds() -> float:
    """Return the CPU seconds of this process and its ended children, without the work of other programs."""
    return sum(os.times()[:4])


def _walk_order(order: str, sizes: dict[str, int], ranks: range) -> Part:
    return walk(plan_of(order, **sizes), ranks, sizes["ranks"])


# --- one rank ---------------------------------------------------------------------------------------------------------


def print_rank(arguments: argparse.Namespace) -> None:
    """Time all steps of one rank in an epoch, in groups, as the loader requests them."""
    sizes = {name: getattr(arguments, name) for name in ("samples", "ranks", "batch", "shard")}
    for order in ("1", f"{arguments.shard}", f"{arguments.shard}/{10 * arguments.shard}/1"):
        began = time.perf_counter()
        plan = plan_of(order, **sizes)
        rank, count = arguments.ranks // 3, 0
        for first in range(0, plan.steps_per_epoch, 64):
            steps = range(first, min(first + 64, plan.steps_per_epoch))
            count += plan.steps_samples(50, steps, rank=rank, world_size=arguments.ranks).size
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"block {plan.block}, window {plan.window}: rank {rank} of {arguments.ranks}, {arguments.samples:,} "
            f"samples: its {count:,} of epoch 50 in {plan.steps_per_epoch:,} steps: {seconds:.2f} s, "
            f"peak memory of the process {peak:.0f} MB"
        )


def print_seek(samples: int) -> None:
    """Time a step in the middle of epoch 50, without earlier steps."""
    for order in ("1", "1000"):
        times_ms = []
        for seed in range(5):
            plan = plan_of(order, samples=samples, ranks=1, batch=256, shard=10_000)
            began = time.perf_counter()
            plan.step_samples(50 + seed, plan.steps_per_epoch // 2)
            times_ms.append(1000 * (time.perf_counter() - began))
        print(
            f"block {order}: a step of 256 in epoch 50 of {samples:,} samples: {statistics.median(times_ms):.2f} ms "
            f"(median of 5; the slowest {max(times_ms):.2f})"
        )


# --- the first batch --------------------------------------------------------------------------------------------------


def print_first_batch(samples: int) -> None:
    """Time the start of a loader, on a set whose index is large and refers to small real tars."""
    import torch

    from launch.benchmarks.datasets import synthetic_set
    from wasteddp.data.loader import training_loader, training_steps
    from wasteddp.data.manifest import Manifest
    from wasteddp.data.reader import SplitReader

    with tempfile.TemporaryDirectory() as folder:
        shards = synthetic_set(Path(folder), samples).folder
        torch.zeros(1)  # a training has initialised torch long before its loader starts
        for number in range(3):
            began = time.perf_counter()
            manifest = Manifest.load(shards)
            sizes = tuple(shard.num_samples for shard in manifest.split("train").shards)
            with SplitReader(manifest, "train") as reader:
                opened = time.perf_counter()
                plan = TrainPlan(reader.num_samples, 64, number, 64, shard_samples=sizes)
                with training_loader(
                    reader,
                    seed=0,
                    image_size_px=224,
                    crop_scale=(0.35, 1.0),
                    crop_ratio=(0.75, 1.33),
                    workers=len(os.sched_getaffinity(0)),
                    prefetch=2,
                    pin_memory=False,
                ) as loader:
                    step = plan.steps_per_epoch * 50 + 7
                    next(loader.batches(training_steps(plan, step, step + 1, rank=0, world_size=1)))
                    seconds = time.perf_counter() - began
            print(
                f"{samples:,} samples in {plan.num_shards} shards, in epoch 50: manifest and indexes open after "
                f"{opened - began:.2f} s, first batch of 64 at 224 px after {seconds:.2f} s"
            )


if __name__ == "__main__":
    main()
