"""Benchmarks that anybody can run. Each compares in one run, interleaved, and prints medians.

    python -m launch.bench step       the model's step alone, on images in memory, beside timm's and torchvision's loops
    python -m launch.bench train      the program from shards, beside the step alone, timm's and torchvision's training
    python -m launch.bench loader     images/s of the loader beside torchvision's, webdataset and decoding alone
    python -m launch.bench workers    decoding threads beside processes: what they leave to the launching thread
    python -m launch.bench checks     what all checks of a training cost, as a share of a step
    python -m launch.bench checkpoint the loop's wait for a save beside torch.save; --starts 3: resumed starts
    python -m launch.bench scaling    images/s with ranks through the launcher, and the share of communication

The first line says on what they ran. Read the ratio; the figures themselves are the machine's. Leave the machine alone
meanwhile: a second busy process on two cores can cost either side most of its speed.
"""

from __future__ import annotations

import argparse

from launch import bench_checkpoint, bench_loader, bench_scaling, bench_step, bench_train, bench_workers
from launch.machine import headline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    loader = commands.add_parser("loader", help="the loader beside others on the same JPEGs")
    loader.add_argument("--shards", default="shards/trashnet", help="set whose training images all sides read")
    loader.add_argument("--rounds", type=int, default=3)
    loader.add_argument("--seconds", type=float, default=4.0, help="timed of each side in each round")
    checks = commands.add_parser("checks", help="what all checks of a training cost, as a share of a step")
    checks.add_argument("--config", default="configs/trashnet-scratch-resnet50.yaml")
    checks.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    checks.add_argument("--rounds", type=int, default=20, help="timed steps; each check is timed ten times as often")
    for module in (bench_train, bench_step, bench_scaling, bench_checkpoint, bench_workers):
        module.add(commands)
    arguments = parser.parse_args()
    print(headline() + "\n", flush=True)
    if arguments.command == "step":
        bench_step.compare(arguments)
    elif arguments.command == "scaling":
        bench_scaling.compare(arguments)
    elif arguments.command == "loader":
        bench_loader.compare(arguments.shards, arguments.rounds, arguments.seconds)
    elif arguments.command == "workers":
        bench_workers.compare(arguments)
    elif arguments.command == "checks":
        from launch import bench_checks

        bench_checks.main(arguments.config, arguments.set, arguments.rounds)
    elif arguments.command == "checkpoint":
        bench_checkpoint.compare(arguments)
    else:
        bench_train.compare(arguments)


if __name__ == "__main__":
    main()
