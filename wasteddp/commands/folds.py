"""`wasteddp folds`: cross-validation on a shard set with folds."""

from __future__ import annotations

import argparse

from wasteddp.commands.arguments import Commands, positive
from wasteddp.files import expand_home


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "folds",
        help="cross-validate: train every fold of a shard set and sum up",
        description="Trains one run for each fold of a set made with `wasteddp shard --folds K`, one after another, in "
        "RUN.OUT/fold-0 and so on. Prints mean, standard deviation and the pooled confusion matrix, and saves them in "
        "RUN.OUT/folds.json. The same command continues after a stop. Exit codes: those of `wasteddp train`.",
    )
    command.add_argument("--config", required=True, type=expand_home, metavar="YAML", help="the settings of all runs")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; may be repeated")
    command.add_argument("--processes", type=positive, metavar="N", help="default: one for each GPU, else one")
    command.add_argument("--cpu", action="store_true", help="do not use the GPUs")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--slurm", action="store_true", help="print the commands that train the folds as a Slurm array")
    what.add_argument("--sum-up", action="store_true", help="sum up runs that are finished, without training")
    command.set_defaults(run=_folds)


def _folds(arguments: argparse.Namespace) -> int:
    from wasteddp.tools.cross_validation import FoldsOptions, run
    from wasteddp.training.distributed import launcher

    return run(
        FoldsOptions(
            config=arguments.config,
            sets=arguments.set,
            processes=arguments.processes or (1 if arguments.cpu else max(1, launcher.num_gpus())),
            cpu=arguments.cpu,
            slurm=arguments.slurm,
            sum_up=arguments.sum_up,
        )
    )
