"""The speed of `wasteddp predict` with calibration, unlikeness and decisions, relative to predict without them.

    python -m launch.bench predict                                 ResNet50, 224 px
    python -m launch.bench predict --arch resnet18 --size 64       a small network, which shows the overhead more

Both sides read the same JPEGs of a drawn set with the same random weights, and write a CSV file and the lines of the
terminal. A round measures both, in alternating order. The ratio of a round is that of its two speeds; the result is the
median of all rounds. On a machine that does other work, the speed by processor time is the more certain one.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from contextlib import redirect_stdout
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from launch.benchmarks.datasets import drawn_set, unpack
from launch.benchmarks.untrained import untrained
from wasteddp.data.decoding.workers import Workers, start_workers
from wasteddp.data.manifest import Manifest
from wasteddp.decisions.decide import BinRules, Policy
from wasteddp.decisions.thresholds import ErrorThreshold, RecallThreshold
from wasteddp.decisions.unlikeness import TrainingFeatures
from wasteddp.inference.classifier import Classifier, device_type
from wasteddp.inference.predict import find_images, predict
from wasteddp.inference.prediction_files import Terminal, csv_record

_FEATURES_OF = 1500  # training images, as in a real bundle

_RULE = "| --- | ---: | ---: | ---: | ---: |"

Side = tuple[Classifier, Policy | None]


class Speed(NamedTuple):
    images_per_s: float
    images_per_processor_s: float  # of this process; does not count decoding processes


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("predict", help="predict with calibration, unlikeness and decisions, and without")
    command.set_defaults(run=measure)
    command.add_argument("--arch", default="resnet50")
    command.add_argument("--size", type=int, default=224, metavar="PX", help="side of the network's input")
    command.add_argument("--images", type=int, default=64)
    command.add_argument("--rounds", type=int, default=9)
    command.add_argument("--device", default="auto")


def measure(arguments: argparse.Namespace) -> None:
    """Print the speed of both sides, and the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        shards = drawn_set(Path(folder), num_images=arguments.images, size_px=2 * arguments.size)
        unpack(shards, Path(folder) / "photos", split="train")
        paths = list(find_images([str(Path(folder) / "photos")]))[: arguments.images]
        sides = both_sides(Manifest.load(shards).classes, arguments.arch, arguments.size, device=arguments.device)
        with start_workers(0, device_type(arguments.device)) as workers:
            for side in sides:
                run_side(side, paths, workers, Path(folder))  # to warm up
            rounds = []
            for number in range(arguments.rounds):
                order = (0, 1) if number % 2 == 0 else (1, 0)
                found = {which: run_side(sides[which], paths, workers, Path(folder)) for which in order}
                rounds.append((found[0], found[1]))
    print(summary(rounds, f"{arguments.arch}, {arguments.size} px, {len(paths)} images"))


def both_sides(classes: tuple[str, ...], arch: str, size_px: int, *, device: str) -> tuple[Side, Side]:
    """Return the classifier without any of it, and the one with all of it, with the same weights."""
    card, model = untrained(arch, classes, size_px)
    head = model.get_submodule("fc")
    assert isinstance(head, torch.nn.Linear)  # of torchvision's ResNets
    rng = np.random.default_rng(0)
    features = rng.standard_normal((_FEATURES_OF, head.in_features))
    training = TrainingFeatures.fit(features, np.arange(_FEATURES_OF) % len(classes), features[:500])
    bins = tuple(f"bin {number}" for number in range(-(-len(classes) // 2)))
    bin_of = tuple(number // 2 for number in range(len(classes)))
    costs_KB = 1.0 - np.eye(len(bins))[list(bin_of)]
    policy = Policy(
        BinRules("city", classes, bins, bin_of, costs_KB=costs_KB, person=0.7),
        ErrorThreshold(0.4, 0.02, 0.95, 0.02, 500, 300, 1),
        {classes[-1]: RecallThreshold(0.3, 0.99, 0.95, 300, 0)},
    )
    plain = Classifier(card, model.state_dict(), device=device)
    full = copy(plain)  # with the same network: two of them would differ by where their weights are in memory
    full.card, full.training = replace(card, temperature=1.3), training
    return (plain, None), (full, policy)


def run_side(side: Side, paths: list[str], workers: Workers, folder: Path) -> Speed:
    """Return the speed of one side over all images."""
    classifier, policy = side
    began, used = time.perf_counter(), time.process_time()
    with (
        redirect_stdout(io.StringIO()),
        csv_record(folder / "predictions.csv", classifier.card, decides=policy is not None) as file,
    ):
        terminal = Terminal(classifier.card, top=3, training=classifier.training, policy=policy)
        for prediction in predict(classifier, paths, workers, policy=policy):
            terminal.add(prediction)
            file.add(prediction)
        terminal.finish([])
    assert terminal.num_classified == len(paths)
    return Speed(len(paths) / (time.perf_counter() - began), len(paths) / (time.process_time() - used))


def summary(rounds: list[tuple[Speed, Speed]], title: str) -> str:
    """Return a table of the medians, and the ratios within each round.

    Args:
        rounds: speeds (without, with) of each.
    """
    lines = [title, "", "| predict | without | with all of it | with / without | half of the rounds |", _RULE]
    for what, column in (("images/s", 0), ("images per second of processor time", 1)):
        plain, full = (np.array([side[column] for side in sides]) for sides in zip(*rounds, strict=True))
        low, middle, high = np.quantile(full / plain, [0.25, 0.5, 0.75])
        medians = f"{np.median(plain):.2f} | {np.median(full):.2f}"
        lines.append(f"| {what} | {medians} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)
