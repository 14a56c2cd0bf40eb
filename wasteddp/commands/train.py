"""`wasteddp train`: starts a training on this machine, in as many processes as it has GPUs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from wasteddp.commands.arguments import Commands, positive, to_path
from wasteddp.errors import SettingsError
from wasteddp.training.distributed import launcher


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "train",
        help="train, or continue a training",
        description="Trains on all GPUs of this machine, or on its CPU. The same command continues a run that was "
        "stopped. Exit codes: 0 finished; 2 a mistake, which the message names; 75 stopped by a signal and saved; 70 a "
        "process failed: start it again. The same with Accelerate's launcher: accelerate launch wasteddp/train.py.",
    )
    launcher.add_arguments(command, needs_config=False)
    command.add_argument(
        "--from", dest="weights_of", type=to_path, metavar="RUN",
        help="a new run that starts from the model of a finished one, for a set that has grown; its settings are those "
        "of RUN where --config is not given, and it needs a folder: --out",
    )  # fmt: skip
    command.add_argument("--out", metavar="FOLDER", help="of the run: the same as --set run.out=FOLDER")
    command.add_argument("--processes", type=positive, metavar="N", help="default: one for each GPU, else one")
    command.add_argument("--cpu", action="store_true", help="do not use the GPUs")
    command.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    sets = list[str]()
    if arguments.weights_of:
        arguments.config = arguments.config or str(_settings_of(arguments.weights_of))
        sets.append(f"model.weights={arguments.weights_of}")
        if not (arguments.out or any(value.startswith("run.out=") for value in arguments.set)):
            raise SettingsError(
                f"--from {arguments.weights_of} begins a new run, and no folder is given for it",
                f"the files of {arguments.weights_of} would be overwritten",
                f"add --out with a new folder, such as --out {arguments.weights_of}-2",
            )
    if not arguments.config:
        raise SettingsError(
            "neither --config nor --from is given",
            "there are no settings to train with",
            "add --config YAML, such as configs/resnet50.yaml, or --from RUN",
        )
    if arguments.out:
        sets.append(f"run.out={arguments.out}")
    arguments.set = [*sets, *arguments.set]
    more = {"ACCELERATE_USE_CPU": "true"} if arguments.cpu else {}
    is_launched = bool(os.environ.get("RANK"))  # by srun, torchrun or Accelerate: this is one of their processes
    num = arguments.processes or (1 if arguments.cpu or is_launched else max(1, launcher.num_gpus()))
    return launcher.launch(launcher.as_given(arguments), num, more=more)


def _settings_of(run: Path) -> Path:
    path = run / "settings.yaml"
    if not path.is_file():
        raise SettingsError(
            f"{path} is not there",
            "it is unknown how that run was trained",
            "name the folder of a run, such as runs/resnet50, or give --config",
        )
    return path
