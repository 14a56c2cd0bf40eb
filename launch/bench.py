"""Benchmarks. Each interleaves its sides in one run and prints medians.

    python -m launch.bench step          the step alone, on images in memory, and the loops of timm and torchvision
    python -m launch.bench train         training from shards, the step alone, and the training of timm and torchvision
    python -m launch.bench loader        images/s of the loader, torchvision's, webdataset's and decoding alone
    python -m launch.bench workers       decoding threads and processes: how much they slow down the launching thread
    python -m launch.bench checks        the cost of all checks of a training, as a share of a step
    python -m launch.bench checkpoint    the loop's wait for a save, and torch.save; --starts 3: resumed starts
    python -m launch.bench scaling       images/s at several numbers of ranks, and the share of communication
    python -m launch.bench tracking      the cost of tracking per step; Linux
    python -m launch.bench network       two nodes with a slow link, and settings that help; Linux, as root
    python -m launch.bench predict       predict with calibration, unlikeness and decisions, and without them
    python -m launch.bench export        exported files and PyTorch: images/s and latency
    python -m launch.bench serve         requests/s and latency of the server under load, and a plain loop
    python -m launch.bench unlike        measures of how unlike a model's training images others are, by AUROC

The first line of the output names the hardware and the versions. Compare the ratios; the figures depend on the machine.
Run nothing else meanwhile: a second busy process on two cores can take most of the speed of either side.
"""

from __future__ import annotations

import argparse

from launch.benchmarks import (
    checkpoint,
    checks,
    export,
    loader,
    network,
    predict,
    scaling,
    serve,
    step,
    tracking,
    train,
    unlike,
    workers,
)
from launch.benchmarks.machine import headline


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for module in (
        step,
        train,
        loader,
        workers,
        checks,
        checkpoint,
        scaling,
        tracking,
        network,
        predict,
        unlike,
        export,
        serve,
    ):
        module.add(commands)
    return top


def main() -> None:
    arguments = parser().parse_args()
    print(headline() + "\n", flush=True)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
