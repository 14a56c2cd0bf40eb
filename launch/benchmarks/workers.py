"""python -m launch.bench workers: how much decoding slows down the thread that launches kernels, by kind of worker.

Needs no GPU: a loop of small tensor operations stands for a step that launches kernels. It runs in turns while a loader
decodes at full speed on the other cores, and while the loader is idle. A loader in another program shows how much the
machine itself slows the loop down, by its caches, its memory and its other users: the cost of the loader is the
difference. The share of the time that the loop's thread was on a core separates waiting, for the GIL or for a core,
from slower computation.

Also printed: images/s of the loader alone, the time to its first batch, and the memory of its processes.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch import ROOT
from wasteddp.parallel import num_usable_cores

BATCH, IMAGE_SIZE_PX = 64, 224
KINDS = ("threads", "processes")
ELSEWHERE = "elsewhere"  # a loader in another program
_OPERATIONS = 200  # a "step"
_TURNS = 4
_SETTLES_S = 0.5


def add(commands: Any) -> None:
    parser = commands.add_parser("workers", help="decoding threads and decoding processes")
    parser.set_defaults(run=compare)
    parser.add_argument("--shards", default="shards/trashnet")
    parser.add_argument("--workers", default="", help="numbers of workers, such as 1,2,4 (default: 1 and all cores)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="timed of each side in each round")


def compare(arguments: argparse.Namespace) -> None:
    """Print medians: the speed of the loop with each kind of worker, and the speed of the loader alone."""
    cores = num_usable_cores()
    decoders = max(1, cores - 1)  # one core for the launching thread
    counts = [int(word) for word in arguments.workers.split(",") if word] or sorted({1, cores})
    sides = [("pace", kind, decoders) for kind in (*KINDS, ELSEWHERE)]
    sides += [("loader", kind, count) for count in counts for kind in KINDS]
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(arguments.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            command = [sys.executable, "-m", "launch.benchmarks.workers", *map(str, side), arguments.shards]
            done = subprocess.run(
                [*command, str(arguments.seconds)], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
            )
            found[side].append(json.loads(done.stdout.splitlines()[-1]))

    def median(side: tuple[str, str, int], what: str) -> float:
        return statistics.median(found_one[what] for found_one in found[side])

    print(f"a loop of small tensor operations while {decoders} decode, relative to its speed while the loader is idle:")
    for side in sides[: len(KINDS) + 1]:
        name = side[1] if side[1] in KINDS else "in another program"
        print(
            f"  {name:18s} {median(side, 'kept'):5.2f} of {median(side, 'operations_per_s'):,.0f} per s, on a core "
            f"{median(side, 'on_a_core'):4.0%} of the time; {median(side, 'images_per_s'):8.1f} images/s meanwhile"
        )
    print(f"the loader alone, batches of {BATCH} x {IMAGE_SIZE_PX} px:")
    for count in counts:
        for kind in KINDS:
            side = "loader", kind, count
            print(
                f"  {count} {kind:10s} {median(side, 'images_per_s'):8.1f} images/s   first batch "
                f"{median(side, 'first_batch_s'):5.2f} s"
                + (
                    f"   memory {median(side, 'processes_mb'):5.0f} MB of its processes, of which each worker has "
                    f"{median(side, 'worker_mb'):5.1f}; {median(side, 'shared_mb'):5.1f} MB of batches"
                    if kind == "processes"
                    else ""
                )
            )


@contextmanager
def _loader(kind: str, workers: int, shards: str) -> Iterator[tuple[Any, Iterator[Any]]]:
    from wasteddp.data.loader import training_loader, training_steps
    from wasteddp.data.manifest import Manifest
    from wasteddp.data.reader import SplitReader
    from wasteddp.order.plan import TrainPlan

    with SplitReader(Manifest.load(Path(shards)), "train") as reader:
        plan = TrainPlan(num_samples=reader.num_samples, global_batch=BATCH, seed=0, lanes=BATCH)
        with training_loader(
            reader,
            seed=0,
            image_size_px=IMAGE_SIZE_PX,
            crop_scale=(0.35, 1.0),
            crop_ratio=(3 / 4, 4 / 3),
            workers=workers,
            prefetch=2,
            pin_memory=False,
            processes=kind == "processes",
        ) as loader:
            yield loader, loader.batches(training_steps(plan, 0, 10**6, rank=0, world_size=1))


def _loader_alone(kind: str, workers: int, shards: str, seconds: float) -> dict[str, float]:
    began = time.perf_counter()
    with _loader(kind, workers, shards) as (loader, batches):
        next(batches)
        first_s = time.perf_counter() - began
        for _ in range(8):  # more than are in flight
            next(batches)
        began, images = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            images += len(next(batches).samples)
        rate = images / (time.perf_counter() - began)
        memory = {"processes_mb": 0.0, "worker_mb": 0.0, "shared_mb": 0.0}
        if kind == "processes":
            pool = loader._pool
            memory = {
                "processes_mb": sum(_memory_mb(pid, "Pss_Anon", "Pss_File") for pid in (pool.server.pid, *pool.pids)),
                "worker_mb": statistics.mean(_memory_mb(pid, "Private_") for pid in pool.pids),
                "shared_mb": sum(shared.num_bytes for shared in loader._shared) / 1e6,
            }
        return {"images_per_s": rate, "first_batch_s": first_s, **memory}


def _memory_mb(pid: int, *kinds: str) -> float:
    """Return the kernel's count for a process. Private_: not shared; Pss_: a page of n processes counts 1/n."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) / 1024


def _pace(kind: str, workers: int, shards: str, seconds: float) -> dict[str, float]:
    """Measure small operations per second in the main thread, in turns while a loader decodes and while it is idle.

    Both are in the same process: from process to process the speed of the same loop varies by a third.
    """
    import torch

    torch.set_num_threads(1)
    x = torch.zeros(64)

    def loop() -> tuple[float, float]:
        """Return the operations per second, and the share of the time that the thread was on a core."""
        nonlocal x
        began, cpu_began, operations = time.perf_counter(), time.thread_time(), 0
        while time.perf_counter() - began < seconds / _TURNS:
            for _ in range(_OPERATIONS):
                x = x * 0.5 + 1.0
            operations += 2 * _OPERATIONS
        wall_s, cpu_s = time.perf_counter() - began, time.thread_time() - cpu_began
        return operations / wall_s, cpu_s / wall_s

    with (_another_program if kind == ELSEWHERE else _taking)(kind, workers, shards) as (start, rest):
        alone, loaded, counts = [], [], [rest()]
        for _ in range(_TURNS):
            alone.append(loop())
            start()
            loaded.append(loop())
            counts.append(rest())
    return {
        "operations_per_s": statistics.median(pace for pace, _ in alone),
        "kept": statistics.median(pace for pace, _ in loaded) / statistics.median(pace for pace, _ in alone),
        "on_a_core": statistics.median(on_a_core for _, on_a_core in loaded),
        "images_per_s": (counts[-1] - counts[0]) / seconds,
    }


@contextmanager
def _taking(kind: str, workers: int, shards: str) -> Iterator[tuple[Callable[[], None], Callable[[], int]]]:
    """Yield `start` and `rest`. Between them a thread takes batches; `rest` returns the images so far."""
    images, takes, ends = 0, threading.Event(), threading.Event()

    def take(batches: Iterator[Any]) -> None:
        nonlocal images
        while takes.wait() and not ends.is_set():
            num = len(next(batches).samples)
            images += num

    def rest() -> int:
        takes.clear()
        taken = images
        time.sleep(_SETTLES_S)  # batches in flight are still decoded
        return taken

    with _loader(kind, workers, shards) as (_, batches):
        next(batches)
        taker = threading.Thread(target=take, args=(batches,))
        taker.start()
        try:
            yield takes.set, rest
        finally:
            ends.set()
            takes.set()
            taker.join()


@contextmanager
def _another_program(kind: str, workers: int, shards: str) -> Iterator[tuple[Callable[[], None], Callable[[], int]]]:
    """As `_taking`, with the loader in another program, which is stopped and continued by signals."""
    command = [sys.executable, "-m", "launch.benchmarks.workers", "decode", "threads", str(workers), shards, "0"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin
        assert other.stdout
        other.stdout.readline()  # its first batch is ready

        def rest() -> int:
            print(file=other.stdin, flush=True)
            assert other.stdout
            images = int(other.stdout.readline())
            other.send_signal(signal.SIGSTOP)
            return images

        def start() -> None:
            other.send_signal(signal.SIGCONT)

        try:
            yield start, rest
        finally:
            other.kill()


def _decode(kind: str, workers: int, shards: str) -> None:
    """Decode until killed. For each line of the input, print the number of images so far."""
    images = 0

    def answer() -> None:
        for _ in sys.stdin:
            print(images, flush=True)

    with _loader(kind, workers, shards) as (_, batches):
        next(batches)
        print("decoding", flush=True)
        threading.Thread(target=answer, daemon=True).start()
        while True:
            num = len(next(batches).samples)
            images += num


if __name__ == "__main__":
    what, kind, workers, shards, seconds = sys.argv[1:]
    if what == "decode":
        _decode(kind, int(workers), shards)
    else:
        measure = _loader_alone if what == "loader" else _pace
        print(json.dumps(measure(kind, int(workers), shards, float(seconds))))
