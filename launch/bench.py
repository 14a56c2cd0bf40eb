"""Benchmarks that anybody can run. Each compares in one run, interleaved, and prints medians.

    python -m launch.bench step          the model's step alone, on images in memory, and timm's and torchvision's loops
    python -m launch.bench train         the program from shards, the step alone, and timm's and torchvision's training
    python -m launch.bench loader        images/s of the loader, torchvision's, webdataset's and decoding alone
    python -m launch.bench workers       decoding threads and processes: what they leave to the launching thread
    python -m launch.bench checks        what all checks of a training cost, as a share of a step
    python -m launch.bench checkpoint    the loop's wait for a save, and torch.save; --starts 3: resumed starts
    python -m launch.bench scaling       images/s with ranks through the launcher, and the share of communication
    python -m launch.bench tracking      what tracking costs, compared with a step; Linux
    python -m launch.bench network       two nodes on a slow link, and what helps; Linux, as root

The first line says on what they ran. Read the ratio; the figures themselves are the machine's. Leave the machine alone
meanwhile: a second busy process on two cores can cost either side most of its speed.
"""

from __future__ import annotations

import argparse

from launch.benchmarks import checkpoint, checks, loader, network, scaling, step, tracking, train, workers
from launch.benchmarks.machine import headline


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for module in (step, train, loader, workers, checks, checkpoint, scaling, tracking, network):
        module.add(commands)
    return top


def main() -> None:
    arguments = parser().parse_args()
    print(headline() + "\n", flush=True)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
