"""The command features, and the arguments of `evaluate --images`."""

from __future__ import annotations

import argparse

from wasteddp.commands.arguments import Commands, add_compute, add_run, keywords, to_path
from wasteddp.errors import SettingsError

ONLY_OF_IMAGES = ("name", "classes", "class_folders", "ignore", "encoding")


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "features",
        help="add the features of training images to a run's model",
        description="Computes features of at most 1,500 training and 500 validation images and saves their summary in "
        "the model. predict and evaluate then report how unlike the training images an image is. A training does this "
        "at its end; the command is for older models and for averages.",
    )
    add_run(command)
    add_compute(command)
    command.set_defaults(run=_features)


def _features(arguments: argparse.Namespace) -> None:
    from wasteddp.tools.model_additions import add_features

    add_features(**keywords(arguments))


def add_images(command: argparse.ArgumentParser) -> None:
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


def evaluate_images(arguments: argparse.Namespace) -> None:
    if arguments.bins or arguments.max_error is not None:
        raise SettingsError(
            f"--{'bins' if arguments.bins else 'max-error'} was given with --images",
            "it would have no effect: decisions are measured on splits of a shard set",
            "leave it out, or shard these images: wasteddp shard IMAGES --out SET --classes-from RUN --fractions 0,0,1",
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


def refuse_without_images(arguments: argparse.Namespace) -> None:
    """Refuse options that have an effect only with --images."""
    given = [name for name in ONLY_OF_IMAGES if getattr(arguments, name)]
    if given:
        raise SettingsError(
            f"--{given[0].replace('_', '-')} was given without --images",
            "it would have no effect on the evaluation of a split",
            "give --images FOLDER too, or leave it out",
        )
