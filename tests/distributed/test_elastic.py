"""torchrun with a range of nodes: one of two is killed, and the other resumes alone from the last checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trainings import PROGRAM, ROOT, config_of, rows


def agent(log: Path, arguments: list[str], *, is_host: bool) -> subprocess.Popen[bytes]:
    """Start one node: the command of launch/README.md, with shorter timeouts. The host runs the rendezvous."""
    elastic = ["--nnodes=1:2", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_backend=c10d", "--rdzv_id=elastic"]
    patience = f"is_host={is_host},last_call_timeout=5,keep_alive_interval=1"
    elastic += ["--rdzv_endpoint=127.0.0.1:29527", f"--rdzv_conf={patience}"]
    program = [str(PROGRAM), *arguments]
    command = [sys.executable, "-m", "torch.distributed.run", *elastic, *program]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the agent and its rank at the same time, as when a node fails."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)


def test_the_node_that_is_left_goes_on_alone(small_shards: Path, tmp_path: Path) -> None:
    arguments = [*config_of(tmp_path, small_shards), "--set", "train.epochs=10"]
    logs = [tmp_path / "first.txt", tmp_path / "second.txt"]
    first = agent(logs[0], arguments, is_host=True)
    second = agent(logs[1], arguments, is_host=False)
    try:
        for _ in range(1200):
            said = "".join(log.read_text() for log in logs)
            if "2 x cpu" in said and "step 3/40" in said:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(said)
        kill(second)
        assert first.wait(timeout=240) == 0, logs[0].read_text()
    finally:
        for process in (first, second):
            if process.poll() is None:
                kill(process)
            process.wait()
    said = logs[0].read_text()
    alone = said[said.rindex("1 x cpu") :]
    assert "1 processes x 6 images x 2 accumulated" in alone
    assert "finished at step 40" in alone
    done = rows(tmp_path / "run")
    assert [row["step"] for row in done] == list(range(1, 41))
    assert done[-1]["attempt"] >= 2
