"""The command `wasteddp`. Training itself is `accelerate launch wasteddp/train.py`.

The commands are in `commands`, each with a parser and a function. The function imports what it needs, so that `--help`
is fast and does not import torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from wasteddp import __version__
from wasteddp.commands import models, preparing, shard, shard_sets, watching
from wasteddp.errors import EXIT_FINISHED, WastedError, exit_with


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="wasteddp", description=__doc__.splitlines()[0])
    top.add_argument("--version", action="version", version=f"wasteddp {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (shard, shard_sets, preparing, models, watching):
        module.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A `WastedError` is printed, with exit code 2."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except WastedError as error:
        exit_with(error)
    except BrokenPipeError:  # `wasteddp ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python prints another error at exit
        return 141  # 128 + SIGPIPE, as a shell expects
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return EXIT_FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
