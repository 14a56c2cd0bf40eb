"""The commands before a run: settings, doctor, lr-find, verify-resume."""

from __future__ import annotations

import argparse
from pathlib import Path

from wasteddp.commands.arguments import Commands, positive, to_path, words
from wasteddp.files import expand_home
from wasteddp.tools import doctor


def add(commands: Commands) -> None:
    _add_doctor(commands)
    _add_lr_find(commands)
    _add_verify_resume(commands)
    _add_settings(commands)


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
