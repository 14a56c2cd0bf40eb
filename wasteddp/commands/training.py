"""The commands before and for a training: doctor, lr-find, verify-resume, settings, train, folds."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from wasteddp.commands.arguments import Commands, positive, to_path, words
from wasteddp.errors import SettingsError
from wasteddp.files import expand_home
from wasteddp.tools import doctor
from wasteddp.training.distributed import launcher


def add(commands: Commands) -> None:
    _add_doctor(commands)
    _add_lr_find(commands)
    _add_verify_resume(commands)
    _add_settings(commands)
    _add_train(commands)
    _add_folds(commands)


def _add_doctor(commands: Commands) -> None:
    command = commands.add_parser(
        "doctor",
        help="check machine, data and disk before a long run",
        description="Prints each check as green, yellow or red, with what to do. Exit codes: 0 all green, 1 yellow, 2 "
        "red. For several processes: accelerate launch ... -m wasteddp.tools.doctor",
    )
    doctor.add_arguments(command)
    command.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    raise SystemExit(doctor.run(arguments))


def _add_lr_find(commands: Commands) -> None:
    command = commands.add_parser(
        "lr-find",
        help="try increasing learning rates and suggest one",
        description="A range test: trains some steps of a configuration with an increasing learning rate until the "
        "loss explodes, and suggests a rate. Uses one process; does not change run.out.",
    )
    command.add_argument("--config", required=True, type=expand_home, metavar="YAML")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--steps", type=positive, default=100, metavar="N", help="default: %(default)s")
    command.add_argument("--from", dest="lowest", type=float, default=1e-6, metavar="LR", help="default: %(default)s")
    command.add_argument("--to", dest="highest", type=float, default=10.0, metavar="LR", help="default: %(default)s")
    command.add_argument(
        "--out", type=to_path, metavar="FOLDER", help="folder of the result (default: run.out with .lr-find)"
    )
    command.set_defaults(run=_lr_find)


def _lr_find(arguments: argparse.Namespace) -> None:
    from wasteddp import settings as settings_file
    from wasteddp.tools import lr_find

    settings = settings_file.load(arguments.config, arguments.set)
    options = lr_find.Options(arguments.steps, arguments.lowest, arguments.highest)
    lr_find.run(settings, options, arguments.out, lambda line: print(line, flush=True))


def _add_verify_resume(commands: Commands) -> None:
    command = commands.add_parser(
        "verify-resume",
        help="prove that a killed training ends like an undisturbed one",
        description="Trains some steps undisturbed, then again with SIGKILL and SIGTERM at random moments, and prints "
        "both runs step by step. Exit code 0: the same samples, images and, at one number of processes, weights, bit "
        "for bit; otherwise 2. Removes both runs if they are equal, and keeps the receipt. On a GPU, sets "
        "run.deterministic in both, unless --set sets it.",
    )
    command.add_argument("--config", required=True, type=expand_home, metavar="YAML")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument(
        "--steps", type=positive, default=20, metavar="N", help="training steps (default: %(default)s)"
    )
    command.add_argument("--kills", type=positive, default=3, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--processes",
        default="1",
        metavar="N,...",
        help="processes of the attempts, in turn, such as 1,2 (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, metavar="S", help="seed of the moments and signals (default: random)")
    command.add_argument(
        "--out", type=to_path, default=Path("runs/verify-resume"), metavar="FOLDER", help="folder of the receipt"
    )
    command.set_defaults(run=_verify_resume)


def _verify_resume(arguments: argparse.Namespace) -> None:
    import secrets

    import torch

    from wasteddp.tools import verify_resume

    proof = verify_resume.prove(
        arguments.config,
        arguments.set,
        steps=arguments.steps,
        kills=arguments.kills,
        processes=tuple(positive(part) for part in words(arguments.processes)),
        seed=secrets.randbelow(10**6) if arguments.seed is None else arguments.seed,
        out=arguments.out,
        say=lambda line: print(line, flush=True),
        deterministic=torch.cuda.is_available(),
    )
    verify_resume.show(proof, arguments.out)
    verify_resume.refuse(proof, arguments.out)


def _add_settings(commands: Commands) -> None:
    add = commands.add_parser("settings", help="print all settings with their meanings, or their JSON Schema")
    add.add_argument("config", nargs="?", type=expand_home, metavar="YAML", help="default: only the defaults")
    add.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    add.add_argument("--schema", action="store_true", help="print the JSON Schema, for editors")
    add.set_defaults(run=_settings)


def _settings(arguments: argparse.Namespace) -> None:
    import json

    from wasteddp import settings

    if arguments.schema:
        print(json.dumps(settings.json_schema(), indent=1))
    else:
        config, overrides = arguments.config, arguments.set
        loaded = settings.load(config, overrides) if config else settings.parse("", overrides)
        print(settings.explained_yaml(loaded), end="")


def _add_train(commands: Commands) -> None:
    command = commands.add_parser(
        "train",
        help="train, or continue a training",
        description="Trains on all GPUs of this machine, or on its CPU. The same command continues a run that was "
        "stopped. Exit codes: 0 finished; 2 a mistake, which the message names; 75 stopped by a signal and saved; 70 a "
        "process failed: start it again. The same with Accelerate's launcher: accelerate launch wasteddp/train.py.",
    )
    add_train_arguments(command)
    command.add_argument("--processes", type=positive, metavar="N", help="default: one for each GPU, else one")
    command.add_argument("--cpu", action="store_true", help="do not use the GPUs")
    command.set_defaults(run=_train)


def add_train_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `wasteddp train` that do not concern its processes; slurm/train.sh has them too."""
    launcher.add_arguments(command, needs_config=False)
    command.add_argument(
        "--from", dest="weights_of", type=to_path, metavar="RUN",
        help="a new run that starts from the model of a finished one, for a set that has grown; its settings are those "
        "of RUN where --config is not given, and it needs a folder: --out",
    )  # fmt: skip
    command.add_argument("--out", metavar="FOLDER", help="of the run: the same as --set run.out=FOLDER")


def _train(arguments: argparse.Namespace) -> int:
    resolve(arguments)
    more = {"ACCELERATE_USE_CPU": "true"} if arguments.cpu else {}
    is_launched = bool(os.environ.get("RANK"))  # by srun, torchrun or Accelerate: this is one of their processes
    num = arguments.processes or (1 if arguments.cpu or is_launched else max(1, launcher.num_gpus()))
    return launcher.launch(launcher.as_given(arguments), num, more=more)


def resolve(arguments: argparse.Namespace) -> None:
    """Write --from and --out as --config and --set, which are all that `wasteddp/train.py` takes.

    Raises:
        SettingsError: the settings or the run's folder are not given.
    """
    sets = list[str]()
    if arguments.weights_of:
        if not arguments.config:
            arguments.config = str(_settings_of(arguments.weights_of))
            sets.append("data.staged=")  # a copy on the disk of the node on which that run was trained
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
    for option, key in (("--out", "run.out"), ("--from", "model.weights")):
        if any(one.startswith(f"{key}=") for one in sets) and any(one.startswith(f"{key}=") for one in arguments.set):
            raise SettingsError(
                f"{option} and --set {key}=... are both given",
                f"one of them would have no effect: {option} sets {key}",
                "leave one of them out",
            )
    arguments.set = [*sets, *arguments.set]


def _settings_of(run: Path) -> Path:
    path = run / "settings.yaml"
    if not path.is_file():
        raise SettingsError(
            f"{path} is not there",
            "it is unknown how that run was trained",
            "name the folder of a run, such as runs/resnet50, or give --config",
        )
    return path


def _add_folds(commands: Commands) -> None:
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
    from wasteddp.tools.cross_validation import cross_validate

    return cross_validate(
        arguments.config,
        arguments.set,
        processes=arguments.processes or (1 if arguments.cpu else max(1, launcher.num_gpus())),
        cpu=arguments.cpu,
        slurm=arguments.slurm,
        train=not arguments.sum_up,
    )
