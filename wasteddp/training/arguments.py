"""The arguments of a training. No torch: wrong ones are refused before it is imported."""

from __future__ import annotations

import argparse

from wasteddp.files import expand_home


def parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of `wasteddp/train.py`."""
    made = argparse.ArgumentParser(
        prog="wasteddp/train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(made, needs_config=True)
    return made


def add_arguments(command: argparse.ArgumentParser, *, needs_config: bool) -> None:
    """Add what `wasteddp/train.py` and `wasteddp train` have in common."""
    command.add_argument(
        "--config", required=needs_config, type=expand_home, metavar="YAML", help="the settings of the run"
    )
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; may be repeated")
    command.add_argument(
        "--resume", default="auto", type=expand_home, metavar="auto|never|PATH",
        help="auto: continue from the newest whole checkpoint of run.out, else start from the beginning (default); "
        "PATH: a checkpoint or a run",
    )  # fmt: skip
    command.add_argument(
        "--accept-changes", default="", metavar="NAME,...", help="continue although these differ from the checkpoint's"
    )
    command.add_argument(
        "--check", action="store_true", help="one step, evaluation and checkpoint, in a folder that is removed"
    )


def as_given(arguments: argparse.Namespace) -> list[str]:
    """The command line that `parser` parses to the same arguments."""
    line = ["--config", arguments.config, *(part for value in arguments.set for part in ("--set", value))]
    line += ["--resume", arguments.resume, "--accept-changes", arguments.accept_changes]
    return line + ["--check"] * arguments.check
