"""The command `wasteddp`: everything but training itself, which is `accelerate launch wasteddp/train.py`.

The commands are in `commands`, each a parser and a function; the function imports what it needs, so that help is
instant and torch-free.
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
    for room in (shard, shard_sets, preparing, models, watching):
        room.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a `WastedError` becomes its message and exit code 2."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except WastedError as error:
        exit_with(error)
    except BrokenPipeError:  # `wasteddp ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its exit
        return 141  # 128 + SIGPIPE, what a shell expects
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return EXIT_FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
