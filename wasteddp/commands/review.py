"""The command review: labels to look at."""

from __future__ import annotations

import argparse

from wasteddp.commands.arguments import Commands, add_compute, add_decoders, positive, to_path, words
from wasteddp.files import expand_home


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "review",
        help="find labels that are probably wrong, and write a page to correct them",
        description="Writes one HTML page with the images whose label is probably wrong, near-duplicates with "
        "different labels, and the images without a label that are most worth one. It works with the keyboard and on a "
        "phone, and saves a CSV for `wasteddp shard --corrections`.",
    )
    command.add_argument("run_folder", metavar="RUN", type=to_path, help="folder of a run, such as runs/resnet50")
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--split",
        type=words,
        default=(),
        metavar="NAMES",
        help="splits to review, such as test or val,test (default: val,test). The model was trained on train, so its "
        "probabilities there are not held out",
    )
    which.add_argument(
        "--predictions",
        type=to_path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="held-out predictions.csv files of `evaluate`, such as those of all folds, used instead of --split",
    )
    command.add_argument(
        "--unlabelled",
        type=expand_home,
        default="",
        metavar="FOLDER-OR-CSV",
        help="images without labels, or a CSV of `predict` with them",
    )
    command.add_argument("--out", type=to_path, metavar="FILE", help="default: RUN/review.html")
    command.add_argument(
        "--limit", type=positive, default=400, metavar="N", help="most pictures on the page (default: %(default)s)"
    )
    command.add_argument(
        "--no-pairs",
        dest="pairs",
        action="store_false",
        help="do not look for near-duplicates, which decodes every image of the set",
    )
    command.add_argument(
        "--shards", type=expand_home, metavar="FOLDER-OR-URL", help="shard set (default: the one trained on)"
    )
    add_compute(command)
    add_decoders(command)
    command.set_defaults(run=_review)


def _review(arguments: argparse.Namespace) -> None:
    from wasteddp.tools.review import review_run

    review_run(**{name: value for name, value in vars(arguments).items() if name != "run"})
