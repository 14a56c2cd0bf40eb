"""Starts the processes of a training on one machine, and ends with the program's own exit code. No torch here.

What differs from `accelerate launch` and `torchrun`: exit code 75 stays 75, the program's message is the last one, and
a signal reaches each process once. Each process gets a session of its own, so that a terminal's Ctrl-C comes from here
alone; where this process is killed, the kernel sends them SIGTERM (`watchdog.signals`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from wasteddp.errors import EXIT_FAILED, EXIT_FINISHED
from wasteddp.training.distributed.ranks import free_port, rank_environment

PROGRAM = Path(__file__).parents[2] / "train.py"
_POLL_S = 0.05
_END_S = 120.0  # for the others to end after one process has failed; they need seconds
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # Nvidia, AMD, Windows' subsystem


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
    port, processes = free_port(), list[subprocess.Popen[bytes]]()

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    for rank in range(num):
        own = dict(environment)
        if num > 1:
            own = {"OMP_NUM_THREADS": "1", **own, **rank_environment(rank, num, port)}  # run.threads sets the rest
        own["WASTEDDP_LAUNCHER"] = str(os.getpid())
        processes.append(subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, start_new_session=True))
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
