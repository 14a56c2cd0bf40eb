"""The command `wasteddp`.

The commands are in `commands`, each with a parser and a function. The function imports what it needs, so that `--help`
is fast and does not import torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from wasteddp import __version__, environment
from wasteddp.commands import evaluate, models, runs, shard, shard_sets, training
from wasteddp.errors import EXIT_FINISHED, WastedError, exit_with, storage_error


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="wasteddp", description="Sharding, training and deciding: images of waste.")
    top.add_argument("--version", action="version", version=f"wasteddp {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (shard, shard_sets, training):
        module.add(commands)
    models.add_calibrate(commands)
    models.add_features(commands)
    evaluate.add(commands)
    models.add_predict(commands)
    runs.add(commands)
    models.add_serve(commands)
    models.add_export(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A `WastedError` is printed, with exit code 2."""
    environment.prepare()
    top = parser()
    _suggest(top, sys.argv[1:] if argv is None else argv)
    arguments = top.parse_args(argv)
    try:
        return arguments.run(arguments) or EXIT_FINISHED
    except WastedError as error:
        exit_with(error)
    except BrokenPipeError:  # `wasteddp ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python prints another error at exit
        return 141  # 128 + SIGPIPE, as a shell expects
    except OSError as error:  # of a file that no message names more exactly, such as standard output on a full disk
        exit_with(storage_error(error, f"wasteddp {sys.argv[1] if argv is None else argv[0]}", "a file"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _suggest(top: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Exit with the nearest command if the first word is not a command."""
    names = next(action.choices for action in top._actions if isinstance(action, argparse._SubParsersAction))
    if argv and not argv[0].startswith("-") and argv[0] not in names:
        near = difflib.get_close_matches(argv[0], names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(names)}"
        top.error(f"there is no command {argv[0]!r}; {hint}")


if __name__ == "__main__":
    raise SystemExit(main())
