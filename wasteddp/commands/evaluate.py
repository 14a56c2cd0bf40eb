"""The command evaluate: on a split of the shards, or on images that are not in shards."""

from __future__ import annotations

import argparse

from wasteddp.commands.arguments import Commands, add_compute, add_decoders, add_run, add_tta, keywords, share, to_path
from wasteddp.commands.runs import refuse_confidence_alone, save_report
from wasteddp.errors import SettingsError

_ONLY_OF_IMAGES = ("name", "classes", "class_folders", "ignore", "encoding")
_ONLY_OF_SPLITS = ("bins", "max_error", "policy", "choose_on", "confidence", "split")


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "evaluate",
        help="measure a run's model on a split of its shards, or on a folder of images",
        description="Prints accuracy with its 95 % interval, per-class figures and the confusion matrix, and saves "
        "them in RUN/evaluations/SPLIT/. On several GPUs: accelerate launch --multi_gpu -m wasteddp.cli evaluate RUN.",
    )
    add_run(command)
    command.add_argument("--split", help="split to evaluate on (default: test)")
    _add_images(command)
    decisions = command.add_argument_group("decisions: docs/decisions.md")
    decisions.add_argument("--bins", type=to_path, metavar="FILE", help="YAML of bins, hazards and costs")
    decisions.add_argument(
        "--max-error",
        type=share,
        metavar="E",
        help="share of items in a wrong bin among those that no person sees; the threshold is chosen on the run's "
        "evaluation split, with a guarantee",
    )
    decisions.add_argument(
        "--confidence", type=share, metavar="P", help="of the guarantee of --max-error (default: 0.95)"
    )
    decisions.add_argument(
        "--choose-on",
        metavar="SPLIT",
        help="split to choose the thresholds on (default: data.eval_split of the run; the best checkpoint was selected "
        "on it, so the guarantee is better on another one)",
    )
    decisions.add_argument(
        "--policy",
        type=to_path,
        metavar="FILE",
        help="policy.json of this model: measure its bins and thresholds, also on a set of another site with --shards",
    )
    add_compute(command)
    add_decoders(command)
    add_tta(command)
    command.set_defaults(run=_evaluate)


def _add_images(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate` for images that are not in shards."""
    command.add_argument(
        "--near-duplicates",
        action="store_true",
        help="look for near-duplicates of training images, and report the accuracy without them (for splits of "
        "`wasteddp shard` this is known)",
    )
    images = command.add_argument_group("images instead of a split")
    images.add_argument(
        "--images",
        type=to_path,
        metavar="FOLDER",
        help="folder of class folders, zip, tar, or CSV (path,label), such as the photos of a new site",
    )
    images.add_argument("--name", default="", help="folder in RUN/evaluations (default: that of the images)")
    images.add_argument(
        "--classes", type=to_path, metavar="FILE", help="YAML of `class: class of the model`, for other names"
    )
    images.add_argument(
        "--class-folders", choices=("outer", "inner"), default="", help="where the folders of classes are, if unclear"
    )
    images.add_argument("--ignore", nargs="+", default=(), metavar="PATTERN", help="names of files and folders")
    images.add_argument("--encoding", default="", help="of the names in an archive, if it is not UTF-8")


def _evaluate(arguments: argparse.Namespace) -> None:
    given = keywords(arguments)
    if given.pop("images"):
        _evaluate_images(arguments)
        return
    from wasteddp.inference.evaluate import evaluate_run

    _refuse_without_images(arguments)
    decides = arguments.bins is not None or arguments.max_error is not None
    if arguments.choose_on and not decides:
        raise SettingsError(
            f"--choose-on {arguments.choose_on} was given without --bins and --max-error",
            "it would have no effect: no threshold is chosen",
            "give --bins FILE or --max-error E too, or leave it out",
        )
    refuse_confidence_alone(arguments)
    if arguments.policy and decides:
        raise SettingsError(
            f"--policy was given with --{'bins' if arguments.bins else 'max-error'}",
            "a policy has its bins and thresholds already",
            "leave one of them out",
        )
    here = {name: value for name, value in given.items() if name not in _ONLY_OF_IMAGES and value is not None}
    saved = evaluate_run(**here)
    is_run = (arguments.run_folder / "metrics.jsonl").is_file()  # not an average
    if saved and is_run and (decides or arguments.policy):
        save_report([arguments.run_folder])


def _evaluate_images(arguments: argparse.Namespace) -> None:
    given = [name for name in _ONLY_OF_SPLITS if getattr(arguments, name) is not None]
    if given:
        raise SettingsError(
            f"--{given[0].replace('_', '-')} was given with --images",
            "it would have no effect: decisions are measured on splits of a shard set"
            if given[0] != "split"
            else "it would have no effect: all images of the folder are evaluated",
            "leave it out, or shard these images and measure a policy on them: "
            "wasteddp shard IMAGES --out SET --classes-from RUN --fractions 0,0,1; "
            "wasteddp evaluate RUN --shards SET --policy FILE",
        )
    from wasteddp.inference.evaluate_images import ImagesOptions, run

    run(
        ImagesOptions(
            run=arguments.run_folder,
            images=arguments.images,
            name=arguments.name,
            classes=arguments.classes,
            class_folders=arguments.class_folders,
            ignore=tuple(arguments.ignore),
            encoding=arguments.encoding,
            near_duplicates=arguments.near_duplicates,
            shards=arguments.shards,
            batch_size=arguments.batch_size,
            device=arguments.device,
            tta=arguments.tta,
            workers=arguments.workers,
        )
    )


def _refuse_without_images(arguments: argparse.Namespace) -> None:
    """Refuse options that have an effect only with --images."""
    given = [name for name in _ONLY_OF_IMAGES if getattr(arguments, name)]
    if given:
        raise SettingsError(
            f"--{given[0].replace('_', '-')} was given without --images",
            "it would have no effect on the evaluation of a split",
            "give --images FOLDER too, or leave it out",
        )
