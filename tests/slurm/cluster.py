"""A real Slurm for the tests: `cluster.sh` starts it, and `Cluster.run` runs commands on its login node."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
PYTHON_PATH = os.pathsep.join(map(str, (ROOT / "tests" / "support" / "python", ROOT / "tests" / "support", ROOT)))
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")
LIMIT_S = float(os.environ.get("SLURM_TESTS_LIMIT_S", "600"))  # far above the usual time of any event

Found = TypeVar("Found")


def why_not() -> str:
    """Why Slurm cannot run here; '' if it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=SYSTEM_PATH)]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge iproute2"
    user = [] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    tried = subprocess.run(["unshare", *user, "--net", "--mount", "true"], capture_output=True, text=True, check=False)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def until(what: Callable[[], Found], doing: str, every_s: float = 0.1) -> Found:
    end = time.monotonic() + LIMIT_S
    while not (found := what()):
        assert time.monotonic() < end, f"{doing}: not in {LIMIT_S:g} s"
        time.sleep(every_s)
    return found


@dataclass(frozen=True, slots=True)
class Cluster:
    pid: int  # of a process inside

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """Run a command on the login node, in the checkout. Return its output."""
        user = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        enter = ["nsenter", f"--target={self.pid}", *user, "--net", "--mount", "--uts", "--ipc", "--pid"]
        inside = Path(f"/proc/{self.pid}/environ").read_text().split("\0")
        slurm = dict(line.split("=", 1) for line in inside if line.startswith(("SLURM_CONF=", "CLUSTER_DIR=")))
        done = subprocess.run(
            [*enter, "env", f"--chdir={ROOT}", *command],
            env={**_clean_environment(), **slurm, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def submit(self, log: Path, *command: str, environment: Mapping[str, str] | None = None) -> Job:
        """Submit a job with this log, two CPUs per node, no GPU, and a limit of ten minutes."""
        usual = ["--parsable", f"--output={log}", "--gpus-per-node=0", "--cpus-per-task=2", "--time=10"]
        return Job(self, self.run("sbatch", *usual, *command, environment=environment), log)

    def node(self, what: str, name: str) -> None:
        self.run("bash", str(HERE / "node.sh"), what, name)


@dataclass(frozen=True, slots=True)
class Job:
    cluster: Cluster
    id: str
    log: Path

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def seen(self, pattern: str) -> re.Match[str]:
        """Wait until the log matches the pattern."""
        looks = count()

        def look() -> re.Match[str] | None:
            # a question to Slurm takes two processes
            ended = next(looks) % 20 == 19 and self.state() in ENDED
            found = re.search(pattern, self.text())
            assert found or not ended, f"{self.state()} without {pattern!r}:\n{self.text()}"
            return found

        found = until(look, f"waiting for {pattern!r} in\n{self.text()}")
        assert found
        return found

    def state(self, element: str = "") -> str:
        return self.cluster.run("squeue", "-h", "-t", "all", "-j", self.id + element, "-o", "%T").splitlines()[0]

    def end(self, element: str = "") -> str:
        """Wait until the job has ended permanently. Return its last state."""
        try:
            what = f"waiting for the end of job {self.id}{element} of {self.log}"
            until(lambda: self.state(element) in ENDED, what, every_s=1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None
        return self.state(element)

    def warn(self, element: str = "") -> None:
        """Send the signal that --signal=B:USR1@300 sends 300 s before the limit."""
        self.cluster.run("scancel", "--signal=USR1", "--batch", self.id + element)


@contextmanager
def cluster_of(num_nodes: int) -> Iterator[Cluster]:
    command = ["bash", str(HERE / "cluster.sh"), str(num_nodes), "sh", "-c", "echo ready; exec cat"]
    with subprocess.Popen(
        command, env=_clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdin
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "ready\n":
                break
        assert lines[-1:] == ["ready\n"], "the cluster did not come up:\n" + "".join(lines)
        # the started process is `unshare`; its child is the first process inside
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        cat = Path(f"/proc/{children[0]}/task/{children[0]}/children").read_text().split()[-1]
        try:
            yield Cluster(int(cat))
        finally:
            process.stdin.close()  # `cat` ends, and with it the cluster


def _clean_environment() -> dict[str, str]:
    """The environment with this checkout, without variables of a job that runs these tests."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "PYTEST"))}
    changed = {"PYTHONPATH": PYTHON_PATH, "TRAININGS": "narrow slow unreported"}
    return {**kept, **changed, "PATH": SYSTEM_PATH, "OMP_NUM_THREADS": "1"}
