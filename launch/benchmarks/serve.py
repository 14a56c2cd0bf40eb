"""The throughput and latency of `wasteddp serve` under load, relative to a plain loop over the same model.

    python -m launch.bench serve                                          ResNet18, 224 px, 10,000 requests
    python -m launch.bench serve --arch resnet50 --requests 1000

The server is a process of its own; clients are threads of this one, each with one request at a time. One request in 20
is bad: empty, text, half of an image, or a damaged form. Each answer is compared with that of the plain loop, which
decodes and classifies full batches in this process, with no HTTP. Loop and server take turns. Nothing may be lost: a
request without the status that it should have, or with another answer, ends the benchmark. The size of the server in
memory is read after the first turn and after the last; Linux only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.benchmarks.datasets import drawn_set, unpack
from launch.benchmarks.untrained import untrained
from wasteddp.data.manifest import Manifest
from wasteddp.inference.bundle import save_bundle
from wasteddp.inference.classifier import Classifier

ROOT = Path(__file__).parents[2]
_BAD_EVERY = 20
_NUM_IMAGES = 64

Body = tuple[bytes, str]  # with its content type


class Turn(NamedTuple):
    seconds: float
    latencies_s: list[float]  # of each request
    num_bad: int


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("serve", help="requests/s and latency of the server, and a plain loop")
    command.set_defaults(run=measure)
    command.add_argument("--arch", default="resnet18")
    command.add_argument("--size", type=int, default=224, metavar="PX", help="side of the network's input")
    command.add_argument("--requests", type=int, default=10_000)
    command.add_argument("--clients", type=int, default=32)
    command.add_argument("--turns", type=int, default=5, help="of the server, between turns of the loop")


def measure(arguments: argparse.Namespace) -> None:
    """Print the speeds, their ratio, the latencies and the server's size."""
    each = -(-arguments.requests // arguments.turns)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = drawn_set(folder, num_images=_NUM_IMAGES, size_px=2 * arguments.size)
        unpack(shards, folder / "photos", split="train")
        photos = [path.read_bytes() for path in sorted(folder.glob("photos/*/*"))[:_NUM_IMAGES]]
        card, network = untrained(arguments.arch, Manifest.load(shards).classes, arguments.size)
        (folder / "model").mkdir()
        save_bundle(folder / "model", card, network.state_dict())
        classifier = Classifier.load(folder / "model")
        loop(classifier, photos)  # to warm up
        turns, loops, sizes_mb = [], [], []
        with server(folder / "model") as (process, port):
            for _ in range(arguments.turns):
                wanted, speed = loop(classifier, photos)
                loops.append(speed)
                turns.append(load(port, photos, wanted, each, arguments.clients))
                sizes_mb.append(_size_mb(process.pid))
    title = f"{arguments.arch}, {arguments.size} px, {arguments.clients} clients, {each * arguments.turns:,} requests"
    print(summary(title, turns, loops, sizes_mb))


def loop(classifier: Classifier, photos: list[bytes]) -> tuple[list[list[float]], float]:
    """Return the probabilities of all photos, and images/s: decode a batch, classify it, and so on."""
    began = time.perf_counter()
    found: list[list[float]] = []
    for first in range(0, len(photos), classifier.batch_size):
        views = [classifier.view(photo) for photo in photos[first : first + classifier.batch_size]]
        found += classifier.probabilities(views).tolist()
    return found, len(photos) / (time.perf_counter() - began)


@contextmanager
def server(model: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start `wasteddp serve` on a free port, and end it with SIGTERM."""
    command = [sys.executable, "-m", "wasteddp.cli", "serve", str(model), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            line = next((line for line in process.stdout if "http://" in line), "")
            if not line:
                raise SystemExit("the server did not start: see its message")
            yield process, int(line.rpartition(":")[2].split("/")[0].split()[0])
        finally:
            process.send_signal(signal.SIGTERM)
    if process.returncode:
        raise SystemExit(f"the server ended with exit code {process.returncode}")


def load(port: int, photos: list[bytes], wanted: list[list[float]], requests: int, clients: int) -> Turn:
    """Send the requests from so many threads at once, and check each answer.

    Raises:
        SystemExit: a request was lost or got another answer.
    """
    bad: list[Body] = [
        (b"", "image/jpeg"),
        (b"not an image", "image/jpeg"),
        (photos[0][: len(photos[0]) // 2], "image/jpeg"),
        (b"--x\r\nno form", "multipart/form-data; boundary=x"),
    ]
    numbers = count()
    latencies: list[float] = []
    faults: list[str] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while (number := next(numbers)) < requests and not faults:
            is_bad, which = number % _BAD_EVERY == 0, number % len(photos)
            body, kind = bad[number // _BAD_EVERY % len(bad)] if is_bad else (photos[which], "image/jpeg")
            began = time.perf_counter()
            try:
                connection.request("POST", "/predict", body, {"content-type": kind})
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, ValueError, http.client.HTTPException) as error:
                faults.append(f"request {number}: {error!r}")
                return
            latencies.append(time.perf_counter() - began)
            if response.status != (422 if is_bad else 200):
                faults.append(f"request {number}: status {response.status}: {answer}")
            elif not is_bad and not _is_same(answer["answers"][0], wanted[which]):
                faults.append(f"request {number}: {answer}, the loop found {wanted[which]}")
        connection.close()

    began = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults or len(latencies) != requests:
        raise SystemExit("\n".join(["the server lost a request:", *faults[:5]]))
    return Turn(time.perf_counter() - began, latencies, -(-requests // _BAD_EVERY))


def summary(title: str, turns: list[Turn], loops: list[float], sizes_mb: list[float]) -> str:
    """Return a table of medians over the turns, and the ratio within each turn."""
    served = [(len(turn.latencies_s) - turn.num_bad) / turn.seconds for turn in turns]
    ratios = np.array(served) / np.array(loops)
    p50, p99 = np.quantile(np.concatenate([turn.latencies_s for turn in turns]), [0.5, 0.99])
    return "\n".join(
        [
            f"{title}, {sum(turn.num_bad for turn in turns):,} of them bad; all answered as they should be",
            "",
            "| plain loop, images/s | server, images/s | server / loop | turns | p50 | p99 | memory, first to last |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            f"| {np.median(loops):.1f} | {np.median(served):.1f} | {np.median(ratios):.2f} "
            f"| {ratios.min():.2f} to {ratios.max():.2f} | {1000 * p50:.0f} ms | {1000 * p99:.0f} ms "
            f"| {sizes_mb[0]:.0f} to {sizes_mb[-1]:.0f} MB |",
        ]
    )


def _is_same(answer: dict[str, Any], wanted: list[float]) -> bool:
    return bool(np.isclose(answer["probability"], max(wanted), atol=1e-5))


def _size_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1000
