"""The command calibrate."""

from __future__ import annotations

import argparse

from wasteddp.commands.arguments import Commands, add_compute, add_decoders, add_run, keywords


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "calibrate",
        help="fit a model's probabilities to a split",
        description="Fits the temperature by which the model's logits are divided (Guo et al. 2017) on a split the "
        "model was not trained on, and keeps it in the model's card, with the calibration error before and after. "
        "The predicted classes stay the same. A training does this with its best model, where val has enough images.",
    )
    add_run(command)
    command.add_argument("--split", default="", help="split to fit on (default: data.eval_split of the run)")
    add_compute(command)
    add_decoders(command)
    command.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    from wasteddp.tools.model_additions import add_calibration

    add_calibration(**keywords(arguments))
