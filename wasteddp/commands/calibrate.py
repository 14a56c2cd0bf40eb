"""The command calibrate."""

from __future__ import annotations

import argparse

from wasteddp.commands.arguments import Commands, add_compute, add_decoders, to_path
from wasteddp.files import expand_home


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "calibrate",
        help="fit a model's probabilities to a split",
        description="Fits the temperature by which the model's logits are divided (Guo et al. 2017) on a split the "
        "model was not trained on, and keeps it in the model's card, with the calibration error before and after. "
        "The predicted classes stay the same. A training does this with its best model, where val has enough images.",
    )
    command.add_argument("run_folder", metavar="RUN", type=to_path, help="folder of a run, such as runs/resnet50")
    command.add_argument("--split", default="", help="split to fit on (default: data.eval_split of the run)")
    command.add_argument(
        "--shards", type=expand_home, metavar="FOLDER-OR-URL", help="shard set (default: the one trained on)"
    )
    add_compute(command)
    add_decoders(command)
    command.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    from wasteddp.tools.calibrate import run

    run(
        arguments.run_folder,
        split=arguments.split,
        shards=arguments.shards,
        batch_size=arguments.batch_size,
        device=arguments.device,
        workers=arguments.workers,
    )
