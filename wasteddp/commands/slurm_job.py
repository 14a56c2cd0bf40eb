"""The command line of a training in a Slurm job, which slurm/train.sh does not parse itself.

    python -m wasteddp.commands.slurm_job RUN_OUT [arguments of slurm/train.sh]

Checks the arguments and their settings as `wasteddp train` does, before all nodes of the job are used. RUN_OUT is the
run's folder if the arguments do not set it. Prints one line of words that bash can read: JOB, the run's folder, its
shard set, and the arguments of `wasteddp/train.py`. Exit code 2: an error that the user can fix. No torch here.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from wasteddp import environment
from wasteddp import settings as settings_file
from wasteddp.commands import training
from wasteddp.errors import WastedError, exit_with
from wasteddp.training.distributed import launcher


def main(argv: Sequence[str] | None = None) -> None:
    environment.prepare()
    default, *line = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="slurm/train.sh", add_help=False)
    training.add_train_arguments(parser)
    arguments = parser.parse_args(line)
    if not arguments.out:
        arguments.set.insert(0, f"run.out={default}")  # any other value comes later, and counts
    try:
        training.resolve(arguments)
        settings = settings_file.load(arguments.config, arguments.set)
    except WastedError as error:
        exit_with(error)
    words = ("JOB", settings.run.out, settings.data.shards, *launcher.as_given(arguments))
    sys.stdout.buffer.write(os.fsencode(" ".join(map(_quoted, words)) + "\n"))


def _quoted(word: str) -> str:
    return shlex.quote(word).replace("\n", "'$'\\n''")  # the words are one line


if __name__ == "__main__":
    main()
