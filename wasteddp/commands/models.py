"""The commands for trained models: evaluate, predict, average."""

from __future__ import annotations

import argparse

from wasteddp.commands import unlike
from wasteddp.commands.arguments import Commands, add_compute, add_decoders, add_tta, positive, to_path
from wasteddp.files import expand_home


def add(commands: Commands) -> None:
    _add_evaluate(commands)
    _add_predict(commands)
    _add_average(commands)


def _add_evaluate(commands: Commands) -> None:
    command = commands.add_parser(
        "evaluate",
        help="measure a run's model on a split of its shards, or on a folder of images",
        description="Prints accuracy with its 95 % interval, per-class figures and the confusion matrix, and saves "
        "them in RUN/evaluations/SPLIT/. On several GPUs: accelerate launch --multi_gpu -m wasteddp.cli evaluate RUN.",
    )
    command.add_argument("run_folder", metavar="RUN", type=to_path, help="folder of a run, such as runs/resnet50")
    command.add_argument("--split", default="test", help="split to evaluate on (default: %(default)s)")
    unlike.add_images(command)
    command.add_argument(
        "--shards", type=expand_home, metavar="FOLDER-OR-URL", help="shard set (default: the one trained on)"
    )
    add_compute(command)
    add_decoders(command)
    add_tta(command)
    command.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.images:
        unlike.evaluate_images(arguments)
        return
    from wasteddp.inference.evaluate import EvaluateOptions, run

    unlike.refuse_without_images(arguments)
    run(
        EvaluateOptions(
            near_duplicates=arguments.near_duplicates,
            run=arguments.run_folder,
            split=arguments.split,
            shards=arguments.shards,
            batch_size=arguments.batch_size,
            device=arguments.device,
            tta=arguments.tta,
            workers=arguments.workers,
        )
    )


def _add_predict(commands: Commands) -> None:
    command = commands.add_parser(
        "predict",
        help="classify images with a trained model",
        description="Classifies images and lists unreadable files at the end. The exit code is 0 if at least one image "
        "was classified, otherwise 2.",
    )
    command.add_argument("model", metavar="MODEL", type=to_path, help="folder of a run or of its model")
    command.add_argument(
        "paths", type=expand_home, metavar="PATH", nargs="+", help="image files, folders, or quoted globs (also **)"
    )
    command.add_argument("--csv", type=to_path, metavar="FILE", help="write the probabilities of all classes as CSV")
    command.add_argument("--json", type=to_path, metavar="FILE", help="the same as JSON")
    command.add_argument("--top", type=positive, default=3, metavar="N", help="classes to print (default: %(default)s)")
    add_compute(command)
    add_decoders(command)
    add_tta(command)
    command.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> None:
    from wasteddp.inference.predict import PredictOptions, run

    run(
        PredictOptions(
            model=arguments.model,
            paths=tuple(arguments.paths),
            csv=arguments.csv,
            json=arguments.json,
            top=arguments.top,
            batch_size=arguments.batch_size,
            device=arguments.device,
            tta=arguments.tta,
            workers=arguments.workers,
        )
    )


def _add_average(commands: Commands) -> None:
    command = commands.add_parser(
        "average",
        help="average a run's newest checkpoints into a model",
        description="Averages the weights of the newest checkpoints, recomputes BatchNorm's statistics on training "
        "images, compares the result with the run's model on data.eval_split, and writes it to RUN/average/, which "
        "`evaluate` and `predict` accept like a run.",
    )
    command.add_argument("run_folder", metavar="RUN", type=to_path, help="folder of a run, such as runs/resnet50")
    command.add_argument(
        "--last",
        type=positive,
        default=5,
        metavar="N",
        help="checkpoints to average, or as many as the run has, at least 2 (default: %(default)s)",
    )
    command.add_argument(
        "--images", type=positive, default=2048, metavar="N", help="images for the statistics (default: %(default)s)"
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument("--out", type=to_path, metavar="FOLDER", help="default: RUN/average")
    where.add_argument("--replace", action="store_true", help="replace RUN/model")
    command.add_argument(
        "--shards", type=expand_home, metavar="FOLDER-OR-URL", help="shard set (default: the one trained on)"
    )
    add_compute(command)
    command.set_defaults(run=_average)


def _average(arguments: argparse.Namespace) -> None:
    from wasteddp.tools.average import AverageOptions, run

    run(
        AverageOptions(
            run=arguments.run_folder,
            last=arguments.last,
            images=arguments.images,
            out=arguments.out,
            replace=arguments.replace,
            shards=arguments.shards,
            batch_size=arguments.batch_size,
            device=arguments.device,
        )
    )
