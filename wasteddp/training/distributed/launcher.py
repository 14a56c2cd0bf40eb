"""The command line of a training, and the processes that it starts on one machine. No torch here.

`launch` ends with the program's own exit code. What differs from `accelerate launch` and `torchrun`: exit code 75 stays
75, the program's message is the last one, and a signal reaches each process once. Each process gets a session of its
own, so that a terminal's Ctrl-C comes from here alone; if this process is killed, the kernel sends them SIGTERM
(`watchdog.exits`). `Processes` starts them without a launcher, for `verify-resume` and tests.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from wasteddp.errors import EXIT_FAILED, EXIT_FINISHED
from wasteddp.files import expand_home

PROGRAM = Path(__file__).parents[2] / "train.py"
_POLL_S = 0.02
_END_S = 120.0  # for the others to end after one process has failed; they need seconds
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # Nvidia, AMD, Windows' subsystem


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
        help="auto: continue from the newest intact checkpoint of run.out, else start from the beginning (default); "
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


def num_gpus() -> int:
    """Return the GPUs that torch sees. It is asked in a process of its own, since it would keep a GPU's memory."""
    if not any(Path(file).exists() for file in _GPU_FILES):
        return 0
    done = subprocess.run([sys.executable, "-c", _COUNT_GPUS], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def launch(
    arguments: Sequence[str],
    num: int,
    *,
    program: Path = PROGRAM,
    more: Mapping[str, str] | None = None,
    replaces: bool = True,
) -> int:
    """Run the program in `num` processes until all have ended. Return the exit code of the first one that failed.

    Args:
        arguments: of the program.
        num: processes, 1 or more.
        more: environment variables of all processes.
        replaces: a single process replaces this one, and the call does not return.
    """
    command, environment = [sys.executable, str(program), *arguments], {**os.environ, **(more or {})}
    sys.stdout.flush()
    if num == 1 and replaces:
        os.execve(sys.executable, command, environment)
    processes = list[subprocess.Popen[bytes]]()

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    threads = {"OMP_NUM_THREADS": "1"} if num > 1 else {}  # run.threads sets the rest
    environment = {**threads, **environment, "WASTEDDP_LAUNCHER": str(os.getpid())}
    for process in start_ranks(command, num, environment, stdin=subprocess.DEVNULL, start_new_session=True):
        processes.append(process)  # one by one: a signal may come between two
    code, kill_at = EXIT_FINISHED, float("inf")
    while any(process.poll() is None for process in processes):
        failed = next((process.returncode for process in processes if process.returncode), None)
        if failed and code == EXIT_FINISHED:
            code, kill_at = failed, time.monotonic() + _END_S
        if time.monotonic() > kill_at:
            running = ", ".join(str(rank) for rank, process in enumerate(processes) if process.poll() is None)
            print(f"killed rank {running}: still running {_END_S:g} s after the first failure", file=sys.stderr)
            forward(signal.SIGKILL, None)
            kill_at = float("inf")
        time.sleep(_POLL_S)
    for number, handler in before.items():
        signal.signal(number, handler)
    codes = [process.returncode for process in processes]
    code = code or next(filter(None, codes), EXIT_FINISHED)
    if code >= 0:
        return code
    if not any(other > 0 for other in codes):  # else a rank that survived has reported it
        print(
            f"error: every process was killed, the first by {signal.Signals(-code).name} (out of memory? see dmesg)\n"
            "  so: the run stops; its checkpoints are intact\n"
            "  do: run the same command again to resume from the newest checkpoint",
            file=sys.stderr,
        )
    return next((other for other in codes if other > 0), EXIT_FAILED)


def rank_environment(rank: int, num: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for one of `num` processes on one machine; empty for a single one."""
    if num == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_ranks(
    command: Sequence[str], num: int, environment: Mapping[str, str], **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `num` processes of one training, and yield them in the order of their ranks.

    Args:
        environment: variables of all processes.
        options: of `subprocess.Popen`.
    """
    port = free_port()
    for rank in range(num):
        yield subprocess.Popen(command, env={**environment, **rank_environment(rank, num, port)}, **options)


class Processes:
    """The processes of one training."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
        self.processes, self.log = processes, log

    @classmethod
    def start(cls, arguments: Sequence[str], num: int, run: Path) -> Processes:
        """Start `num` processes; their output goes to `run`.log."""
        log = run.with_name(f"{run.name}.log")
        with log.open("a", encoding="utf-8") as file:
            command = [sys.executable, str(PROGRAM), *arguments]
            return cls(list(start_ranks(command, num, os.environ, stdout=file, stderr=subprocess.STDOUT)), log)

    @property
    def are_running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)

    def wait(self) -> tuple[int, ...]:
        """Return all exit codes. After one process ends, the others have 120 s to end before they are killed."""
        until: float | None = None
        while any(process.poll() is None for process in self.processes):
            if until is None and not self.are_running:
                until = time.monotonic() + _END_S
            if until is not None and time.monotonic() > until:
                self.send(signal.SIGKILL)
            time.sleep(_POLL_S)
        return tuple(process.wait() for process in self.processes)
