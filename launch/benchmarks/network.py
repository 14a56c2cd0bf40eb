"""The cost of a slow network, and settings that help: the training program on one node and on two with a slow link.

    python -m launch.bench network [--mbit 1000] [--delay-ms 1] [--set key=value ...]      Linux, as root

Two nodes are two processes of one CPU thread each in their own network namespaces (`launch.benchmarks.link`), so that
the computation takes the same time on one node and on two, given two free cores. Each line is one run, and its value is
the mean of the steps after the first few. The gradients are those of a ResNet18: 11.2 million, 45 MB in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from launch import ROOT
from launch.benchmarks.link import ADDRESSES, DEVICE, ENDS

WARM_STEPS, TIMED_STEPS, ROW_STEPS = 4, 12, 2
IMAGES_PER_NODE = 16  # in a micro-batch
CONFIG = """
precision: fp32
run: {threads: 1}
data: {image_size: 64, workers: 1}
model: {arch: resnet18, weights: none}
train: {epochs: 1000, max_micro_batch: 16}
evaluate: {every_steps: 100000}
track: {wandb: disabled}
"""


class Way(NamedTuple):
    name: str
    nodes: int
    settings: tuple[str, ...] = ()
    accumulation: int = 1
    is_shaped: bool = True

    @property
    def images(self) -> int:
        return IMAGES_PER_NODE * self.nodes * self.accumulation


WAYS = (
    Way("one node", 1),
    Way("two nodes without a slow link", 2, is_shaped=False),
    Way("two nodes", 2),
    Way("two nodes, ddp.bucket_mb=1", 2, ("ddp.bucket_mb=1",)),
    Way("two nodes, ddp.bucket_mb=100", 2, ("ddp.bucket_mb=100",)),
    Way("two nodes, ddp.compression=bf16", 2, ("ddp.compression=bf16",)),
    Way("two nodes, 4 x the batch by accumulation", 2, accumulation=4),
    Way("two nodes, 4 x the batch, bf16", 2, ("ddp.compression=bf16",), accumulation=4),
)


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("network", help="two nodes with a slow link, and settings that help; Linux, as root")
    command.set_defaults(run=compare)
    command.add_argument("--mbit", type=float, default=1000)
    command.add_argument("--delay-ms", type=float, default=1.0)
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--rounds", type=int, default=1, help="runs of each way; the medians are printed")


def compare(arguments: argparse.Namespace) -> None:
    """Print a table: images per step, ms per step and images/s of each way."""
    if os.environ.get("LINK_INSIDE") != "1":
        link = ["launch.benchmarks.link", "--mbit", str(arguments.mbit), "--delay-ms", str(arguments.delay_ms)]
        own = [sys.executable, "-m", "launch.bench", *sys.argv[1:]]
        raise SystemExit(subprocess.run([sys.executable, "-m", *link, *own], cwd=ROOT, check=False).returncode)
    rate_mbit, round_trip_ms = measure_link()
    print(f"the link as measured: {rate_mbit:.0f} Mbit/s, {round_trip_ms:.2f} ms round trip\n", flush=True)
    print("| | images per step | step | images/s |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shards = _shards(Path(folder))
        found: dict[Way, list[float]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way in WAYS:
                found[way].append(_step_ms(way, shards, Path(folder), arguments.set))
        for way, times_ms in found.items():
            step_ms = statistics.median(times_ms)
            rate = 1000 * way.images / step_ms
            print(f"| {way.name} | {way.images} | {step_ms:.0f} ms | {rate:.1f} |", flush=True)


def measure_link(num_bytes: int = 100_000_000) -> tuple[float, float]:
    """Return the Mbit/s of one TCP connection, and the round trip of a byte in ms."""
    server, client = (
        subprocess.Popen(
            ["ip", "netns", "exec", end, sys.executable, "-c", code, str(num_bytes)], stdout=subprocess.PIPE, text=True
        )
        for end, code in zip(ENDS, (_SERVER, _CLIENT), strict=True)
    )
    rate_mbit, round_trip_ms = json.loads(client.communicate()[0])
    server.wait()
    return rate_mbit, round_trip_ms


_SERVER = f"""
import socket, sys
listening = socket.create_server(("{ADDRESSES[0]}", 7000))
one, _ = listening.accept()
for _ in range(50): one.sendall(one.recv(1))
left = int(sys.argv[1])
while left: left -= len(one.recv(1 << 20))
one.sendall(b"x")
"""
_CLIENT = f"""
import json, socket, statistics, sys, time
for _ in range(100):
    try: one = socket.create_connection(("{ADDRESSES[0]}", 7000)); break
    except OSError: time.sleep(0.1)
one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
times = []
for _ in range(50):
    began = time.perf_counter(); one.sendall(b"x"); one.recv(1); times.append(time.perf_counter() - began)
began = time.perf_counter(); one.sendall(bytes(int(sys.argv[1]))); one.recv(1)
rate_mbit = int(sys.argv[1]) * 8e-6 / (time.perf_counter() - began)
print(json.dumps([rate_mbit, 1000 * statistics.median(times)]))
"""


def _shards(folder: Path) -> Path:
    command = [sys.executable, "-m", "wasteddp.cli"]
    images, shards = str(folder / "images"), folder / "shards"
    subprocess.run(
        [*command, "draw", images, "--size", "80", "--images-per-class", "60"], check=True, stdout=sys.stderr
    )
    subprocess.run([*command, "shard", images, "--out", str(shards)], check=True, stdout=sys.stderr)
    return shards


def _step_ms(way: Way, shards: Path, folder: Path, overrides: list[str]) -> float:
    """Return the mean ms of a step of one run. A signal stops the run after enough steps."""
    run = Path(tempfile.mkdtemp(dir=folder))
    (run / "config.yaml").write_text(CONFIG)
    fixed = [f"data.shards={shards}", f"run.out={run}", f"train.batch_size={way.images}"]
    fixed += [f"train.log_every_steps={ROW_STEPS}", *way.settings, *overrides]
    program = ["wasteddp/train.py", "--config", str(run / "config.yaml")]
    program += [word for setting in fixed for word in ("--set", setting)]
    nodes = [_launch(way, rank, program) for rank in range(way.nodes)]
    assert nodes[0].stdout
    for line in nodes[0].stdout:
        if line.startswith(f"step {WARM_STEPS + TIMED_STEPS}/"):
            nodes[0].terminate()
    for node in nodes:
        node.communicate()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = [row["train/step_ms"] for row in rows if WARM_STEPS < row["step"] <= WARM_STEPS + TIMED_STEPS]
    return float(statistics.mean(timed))


def _launch(way: Way, rank: int, program: list[str]) -> subprocess.Popen[str]:
    launcher = ["launch/accelerate/nodes.yaml", "--num_machines", str(way.nodes), "--num_processes", str(way.nodes)]
    address = ADDRESSES[0] if way.is_shaped else "127.0.0.1"
    launcher += ["--machine_rank", str(rank), "--main_process_ip", address]
    where = ["ip", "netns", "exec", ENDS[rank] if way.is_shaped else ENDS[0]]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": DEVICE if way.is_shaped else "lo"}
    environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # the ends have no host names, about which torch would warn
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", *launcher, *program]
    if way.nodes == 1:  # accelerate's launcher of one process does not pass signals on
        command = [sys.executable, *program]
    return subprocess.Popen([*where, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
