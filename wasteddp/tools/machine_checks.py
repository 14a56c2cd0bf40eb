"""Findings, their table and exit codes, and the checks of a machine before a run.

The checks: versions, devices, precision, shared memory, clocks, all-reduce.

Each check returns a finding, a colour, a sentence and what to do, and does not raise for the problem that it looks for.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, TextIO

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wasteddp.errors import LaunchError, inert
from wasteddp.parallel import usable_cores
from wasteddp.training.distributed import precision
from wasteddp.training.distributed.runtime import Runtime

Colour = Literal["green", "yellow", "red"]

EXIT_CODES: dict[Colour, int] = {"green": 0, "yellow": 1, "red": 2}
_CONSTRAINTS = Path(__file__).resolve().parents[2] / "launch" / "constraints.txt"
_DEVELOPMENT = ("hypothesis", "mypy", "pytest", "ruff")
_LEAST_SHM_BYTES = 1 << 30
_LEAST_FREE = 0.9  # of a GPU's memory
_SLOW_ALL_REDUCE_S = 0.5  # on GPUs: probably the wrong network
_MOST_LOAD = 0.5  # running processes for each core, before the run adds its own
_ROUNDS = 5
_MOST_SKEW_S, _WRONG_SKEW_S = 1.0, 60.0
_VERDICTS: dict[Colour, str] = {
    "green": "ready to start",
    "yellow": "the run can start; read the yellow rows first",
    "red": "do not start: fix the red rows first, or the run would fail or be useless",
}
_WIDTH = 130


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    colour: Colour
    found: str
    do: str = ""


def worst(findings: Sequence[Finding]) -> Colour:
    return max((finding.colour for finding in findings), key=lambda colour: EXIT_CODES[colour], default="green")


def print_table(findings: Sequence[Finding], file: TextIO | None = None) -> None:
    """Print the findings as a table, and the verdict. Each colour is also a word, for logs and colour-blind readers."""
    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=_WIDTH)
    table = Table(show_lines=True)
    for title in ("", "check", "found", "what to do"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        colour = finding.colour
        texts = (escape(inert(text)) for text in (finding.check, finding.found, finding.do))
        table.add_row(f"[{colour}]{colour}", *texts)
    console.print(table)
    colour = worst(findings)
    console.print(f"[{colour}]{colour}[/]: {_VERDICTS[colour]}")


def findings_to_json(findings: Sequence[Finding]) -> str:
    colour = worst(findings)
    return json.dumps({"verdict": colour, "findings": [asdict(finding) for finding in findings]}, indent=1)


def versions_tested(constraints: Path = _CONSTRAINTS) -> dict[str, str]:
    """Return the versions that the tests ran with; {} without a checkout."""
    if not constraints.exists():
        return {}
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s#;]+)", constraints.read_text(), flags=re.MULTILINE)
    return {name: number for name, number in found if name not in _DEVELOPMENT and not name.startswith("types-")}


def check_versions(tested: Mapping[str, str]) -> Finding:
    """Compare the installed versions with those of the tests, without local parts (+cpu, +cu126)."""
    if not tested:
        return Finding("versions", "yellow", "the list of tested versions is missing", "run doctor from a checkout")
    found = {name: _version(name) for name in tested}
    missing = [name for name, number in found.items() if not number]
    if missing:
        remedy = "install them: bash launch/install.sh"
        return Finding("versions", "red", f"not installed: {', '.join(missing)}", remedy)
    other = [
        f"{name} {number} (tested: {tested[name]})"
        for name, number in found.items()
        if number.split("+")[0] != tested[name].split("+")[0]
    ]
    names = f"Python {platform.python_version()}, torch {found.get('torch', '?')}, accelerate {found.get('accelerate')}"
    if other:
        return Finding(
            "versions",
            "yellow",
            f"{names}; not as tested: {', '.join(other)}",
            "probably fine; to check: bash launch/test.sh, or install the tested versions: bash launch/install.sh",
        )
    return Finding("versions", "green", f"{names}; {len(found)} packages as tested")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


@dataclass(frozen=True, slots=True)
class Device:
    """The device of one rank."""

    rank: int
    host: str
    identity: str  # of the physical device; "cpu" for processors
    name: str
    free: float  # free part of the device's memory
    threads: int
    cores: frozenset[int]  # that the rank may run on


def device_of(runtime: Runtime) -> Device:
    """Return the device of this rank. A UUID identifies a GPU, since two ranks may number one GPU differently."""
    if runtime.device.type != "cuda":
        identity, name, free = runtime.device.type, platform.machine(), 1.0
    else:
        properties = torch.cuda.get_device_properties(runtime.device)
        available, total = torch.cuda.mem_get_info(runtime.device)
        identity, name, free = str(properties.uuid), properties.name, available / total
    return Device(runtime.rank, socket.gethostname(), identity, name, free, runtime.threads, usable_cores())


def check_devices(devices: list[Device]) -> Finding:
    """Check the devices of all ranks: shared GPUs, too many threads, GPU memory in use, an unused GPU."""
    hosts = Counter(device.host for device in devices)
    kinds = Counter(device.name if device.identity != "cpu" else f"{device.name} CPU" for device in devices)
    found = f"{', '.join(f'{count} x {name}' for name, count in kinds.items())} on {len(hosts)} machine(s)"
    shared = {
        key: ranks for key in {(d.host, d.identity) for d in devices if d.identity not in ("cpu", "mps")}
        if len(ranks := [d.rank for d in devices if (d.host, d.identity) == key]) > 1
    }  # fmt: skip
    if shared:
        (host, identity), ranks = next(iter(shared.items()))
        return Finding(
            "devices",
            "red",
            f"{found}; ranks {', '.join(map(str, ranks))} share the GPU {identity} of {host}",
            "start one process for each GPU: check --num_processes and CUDA_VISIBLE_DEVICES",
        )
    full = [device for device in devices if device.free < _LEAST_FREE]
    if full:
        return Finding(
            "devices",
            "yellow",
            f"{found}; other programs use {1 - full[0].free:.0%} of the memory of rank {full[0].rank}'s GPU on "
            f"{full[0].host}",
            "end these programs (nvidia-smi lists them), or lower train.max_micro_batch",
        )
    for host in hosts:
        here = [device for device in devices if device.host == host and device.identity == "cpu"]
        cores = frozenset[int]().union(*(device.cores for device in here))
        if here and sum(device.threads for device in here) > len(cores):
            return Finding(
                "devices",
                "yellow",
                f"{found}; {sum(d.threads for d in here)} threads on the {len(cores)} cores of {host}",
                "set run.threads to 0, or lower it: threads that wait for each other slow training down severely",
            )
    if devices and devices[0].identity == "cpu" and Path("/dev/nvidia0").exists():
        return Finding(
            "devices",
            "red",
            f"{found}; there is an NVIDIA GPU that torch {torch.__version__} does not detect",
            "install a torch for CUDA, or check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES",
        )
    return Finding("devices", "green", found)


def load_of_machine() -> tuple[float, int]:
    """Return the mean number of running processes of the last minute, and the number of cores."""
    return os.getloadavg()[0], os.cpu_count() or 1


def check_load(running: float, cores: int) -> Finding:
    """Check whether other programs use the processors that the run will decode or train on."""
    found = f"{running:.1f} running processes on {cores} cores in the last minute"
    if running > _MOST_LOAD * cores:
        return Finding("load", "yellow", found, "end other programs (top lists them), or expect a slower run")
    return Finding("load", "green", found)


def check_precision(asked: str) -> Finding:
    has_gpu = torch.cuda.is_available()
    if has_gpu and asked == "auto":
        return Finding(
            "precision", "green", "auto: bf16 or fp16, whichever is measured to be faster at the start of a run"
        )
    try:
        precision.refuse_impossible(asked, has_gpu=has_gpu)
    except LaunchError as error:
        return Finding("precision", "red", error.found, error.remedy)
    chosen = precision.choose(asked, has_gpu=has_gpu, kept=precision.NOTHING_KEPT, measure=lambda _: {})
    if "emulates" in chosen.reason:
        return Finding(
            "precision", "yellow", f"{chosen.name}: {chosen.reason}", "set precision to auto or fp32: it is faster"
        )
    return Finding("precision", "green", f"{chosen.name}: {chosen.reason}")


def check_shared_memory(num_gpus: int, path: Path = Path("/dev/shm")) -> Finding:
    """NCCL uses /dev/shm for messages between the GPUs of a node. Decoding processes use a memfd instead."""
    if not path.exists():
        return Finding("/dev/shm", "green", f"no {path} on {sys.platform}; only NCCL needs it")
    free = shutil.disk_usage(path).free
    found = f"{free / 1e9:.1f} GB free"
    if free < _LEAST_SHM_BYTES and num_gpus > 1:
        return Finding("/dev/shm", "yellow", found, "in a container: start it with --shm-size=2g or --ipc=host")
    return Finding("/dev/shm", "green", found)


def check_clocks(times: list[float]) -> Finding:
    """Compare the clocks of all ranks: with different clocks, log lines and dashboards cannot be compared."""
    skew = max(times) - min(times)
    found = f"{time.strftime('%F %T %Z', time.localtime(times[0]))}; {skew:.2f} s between the earliest and the latest"
    if skew > _WRONG_SKEW_S:
        return Finding("clock", "red", found, "set the clocks (chronyd, ntpd): downloads and W&B refuse wrong times")
    if skew > _MOST_SKEW_S:
        return Finding(
            "clock", "yellow", found, "set the clocks (chronyd, ntpd); otherwise the times in the logs do not match"
        )
    return Finding("clock", "green", found if len(times) > 1 else found.partition(";")[0])


def check_all_reduce(runtime: Runtime, num_bytes: int) -> Finding:
    """All ranks: sum tensors of the model's size, as each step does with the gradients, and check the sums."""
    if runtime.world_size == 1:
        return Finding("all-reduce", "green", "one process: nothing to sum")
    small = torch.arange(1000, dtype=torch.float32, device=runtime.device) + runtime.rank
    expected = torch.arange(1000, dtype=torch.float32) * runtime.world_size + sum(range(runtime.world_size))
    right = torch.equal(runtime.sum(small).cpu(), expected)
    wrong = runtime.totals(not right)[0]
    large = torch.ones(num_bytes // 4, device=runtime.device)
    seconds = []
    for _ in range(_ROUNDS):
        runtime.totals(0)  # all ranks start at the same time
        began = time.perf_counter()
        float(runtime.sum(large)[0])  # reading it waits for the GPU
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[1:])
    found = f"{num_bytes / 1e6:.0f} MB of gradients in {1000 * median:.0f} ms, {num_bytes / median / 1e9:.2f} GB/s"
    if wrong:
        return Finding(
            "all-reduce",
            "red",
            f"wrong sums on {wrong} of {runtime.world_size} ranks",
            "training would silently be wrong: try NCCL_P2P_DISABLE=1 and update driver and NCCL",
        )
    if runtime.device.type == "cuda" and median > _SLOW_ALL_REDUCE_S:
        return Finding(
            "all-reduce",
            "yellow",
            f"{found}, right",
            "slow for GPUs: set NCCL_SOCKET_IFNAME to the fast network; NCCL_DEBUG=INFO shows which one is used",
        )
    return Finding("all-reduce", "green", f"{found}, right on all {runtime.world_size} ranks")
