"""Give damaged files to the program for a time, and print what it neither reads nor refuses with a message.

    python -m tests.fuzz --minutes 60 --seed 0

It damages archives, shard sets, models, checkpoints, a run's files, settings, lists and images. A process of its own
reads each input. A fault is a traceback, an end by a signal, no end within 20 s, more than 1.5 GiB of memory, a file of
more than 1 GiB, or exit code 2 without a message. The first input of each fault is kept in --out. Exit code 1: a fault
was found.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before the import of numpy and torch: no threads may exist before the forks
os.environ["LANGUAGE"] = "C"  # or argparse looks for translations of each of its texts, 10 ms a process

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import narrow

from .harness import fuzz, try_content
from .target import Target
from .targets import make_targets

_MEMORY_BYTES = 2 << 30  # that /dev/shm must have free
CORPUS = Path(__file__).parent / "corpus"  # what found a fault once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--inputs", type=int, default=10**9, help="at most so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument("--check", action="store_true", help="first, try all intact files, and those of corpus/")
    parser.add_argument("--only", default="", metavar="TEXT", help="targets whose names contain this text")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="default: %(default)s")
    arguments = parser.parse_args()
    narrow.install()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_in_memory()) as folder:
        targets = [one for one in make_targets(Path(folder, "targets")) if arguments.only in one.name]
        if arguments.check and not _check(targets, Path(folder)):
            return 1
        began = time.monotonic()
        result = fuzz(
            targets,
            seed=arguments.seed,
            num_inputs=arguments.inputs,
            until=began + 60 * arguments.minutes,
            keep=arguments.out,
            work=Path(folder),
            num_jobs=arguments.jobs,
        )
    for name, count in sorted(result.inputs.items()):
        print(f"{name:30} {count:7,}")
    total = result.inputs.total()
    ends = ", ".join(f"{count:,} {end}" for end, count in result.ends.most_common())
    took_s = time.monotonic() - began
    print(f"{total:,} inputs in {took_s:.0f} s, {total / took_s:.1f} per second: {ends}")
    for finding in result.findings:
        print(f"found: {finding}")
    return 1 if result.findings else 0


def _in_memory() -> str | None:
    """Return a folder in memory, or None for the usual one. On a disk, an input takes twice as long."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > _MEMORY_BYTES else None


def _check(targets: Sequence[Target], folder: Path) -> bool:
    """Print the intact files that are not read, and the files of corpus/TARGET/ that are neither read nor refused."""
    passed = True
    for target in targets:
        inputs = {"the intact file": target.folder / target.file}
        inputs |= {str(path): path for path in sorted((CORPUS / target.name).glob("*"))}
        for name, path in inputs.items():
            with tempfile.TemporaryDirectory(dir=folder) as work:
                end, output = try_content(target, path.read_bytes(), Path(work))
            if end not in (("read",) if path == target.folder / target.file else ("read", "refused")):
                print(f"found: {name} of {target.name}: {end}\n{output.decode(errors='replace')}")
                passed = False
    return passed


if __name__ == "__main__":
    raise SystemExit(main())
