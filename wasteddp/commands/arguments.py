"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeAlias

from wasteddp.files import expand_home

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a command's arguments by name, as its function of the package takes them."""
    return {name: value for name, value in vars(arguments).items() if name != "run"}


def add_run(command: argparse.ArgumentParser) -> None:
    """Add the folder of a run, and the shard set to use instead of its own."""
    command.add_argument("run_folder", metavar="RUN", type=to_path, help="folder of a run, such as runs/resnet50")
    command.add_argument(
        "--shards", type=expand_home, metavar="FOLDER-OR-URL", help="shard set (default: the one trained on)"
    )


def add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=positive, metavar="N", help="threads (default: one per core)")


def add_decoders(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=_decoders,
        default=0,
        metavar="N",
        help="decoders of images: '4 processes', '4 threads', or 4 of the kind that suits the device: processes on a "
        "GPU, threads on a CPU (default: chosen for the machine); the results do not depend on it",
    )


def _decoders(text: str) -> str:
    from wasteddp.settings import Data

    try:
        Data(workers=text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor 'N threads' nor 'N processes'") from error
    return text


def to_path(text: str) -> Path:
    return Path(expand_home(text))


def numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, such as 0.7,0.15,0.15") from None


def integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, such as 1,2,4") from None


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return number


def share(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def add_compute(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="images per batch (default: 8 on a CPU, 64 on a GPU; another number may change the last digits of a "
        "probability)",
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")


def add_tta(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tta",
        choices=("none", "flip", "flips"),  # of `any_classifier.VIEWS`, whose import would take a tenth of a second
        default="none",
        help="test-time augmentation: the mean over the image and its mirror image (flip, twice the time) or over all "
        "four flips (flips, four times the time)",
    )
