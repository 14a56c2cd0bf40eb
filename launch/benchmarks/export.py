"""python -m launch.bench export: images/s and latency of each exported file on this CPU, beside PyTorch's.

All sides have the same number of threads, the same images and the same outputs. They run in turns, so that a change of
the machine's speed meets all of them alike, and the medians over the rounds are printed. The ratio is the median over
the rounds of (images/s of the side / images/s of PyTorch in the same round).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PAUSE_S = 0.1  # onnxruntime's threads wait actively for the next call for a while


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("export", help="exported files beside PyTorch: images/s and latency")
    command.set_defaults(run=compare)
    command.add_argument("--model", type=Path, help="a run or its model (default: random weights)")
    command.add_argument("--arch", default="resnet50", help="without --model (default: %(default)s)")
    command.add_argument("--image-size", type=int, default=224, help="without --model, px (default: %(default)s)")
    command.add_argument("--batches", default="1,32", help="batch sizes (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    command.add_argument("--seconds", type=float, default=1.5, help="of each side in a round (default: %(default)s)")


def compare(arguments: argparse.Namespace) -> None:
    """Export, run all sides in turns, and print a table."""
    import torch

    print(f"{torch.get_num_threads()} thread(s)")
    with tempfile.TemporaryDirectory() as folder:
        sides, side_px, title = _sides(arguments, Path(folder))
        for size in map(int, arguments.batches.split(",")):
            images = torch.randint(0, 256, (size, side_px, side_px, 3), dtype=torch.uint8).numpy()
            found: dict[str, list[float]] = {name: [] for name in sides}
            for run in sides.values():
                run(images)
            for number in range(arguments.rounds):
                order = list(sides) if number % 2 else list(sides)[::-1]
                for name in order:
                    time.sleep(_PAUSE_S)
                    found[name].append(_time(sides[name], images, arguments.seconds))
            print(f"\n{title}, batch {size}, {side_px} px, medians of {arguments.rounds} rounds")
            for name, times in found.items():
                ratio = statistics.median(base / own for base, own in zip(found["PyTorch"], times, strict=True))
                median = statistics.median(times)
                print(f"  {name:14} {size / median:8.1f} images/s {1000 * median:9.1f} ms {ratio:6.2f} of PyTorch")


def _time(run: Callable[[Any], Any], images: Any, seconds: float) -> float:
    """Return the median time of a call, s."""
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        before = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def _sides(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Callable[[Any], Any]], int, str]:
    import torch

    from launch.benchmarks.untrained import untrained
    from wasteddp.errors import LaunchError
    from wasteddp.export import runtimes
    from wasteddp.export.runtimes import Exported
    from wasteddp.inference.classifier import load_network
    from wasteddp.inference.onnx_classifier import metadata_of

    if arguments.model:
        card, network = load_network(arguments.model)
    else:
        card, network = untrained(arguments.arch, "abcdef", arguments.image_size)
    side_px = card.preprocessing.image_size_px
    module, metadata = Exported(card, network), metadata_of(card, None)
    files = {
        "torch.export": runtimes.run_torch_export(
            runtimes.write_torch_export(module, side_px, folder / "model.pt2", metadata)
        )
    }
    try:
        path = runtimes.write_onnx(module, side_px, folder / "model.onnx", metadata)
        files["ONNX"] = runtimes.run_onnx(path)
        views = iter(torch.randint(0, 256, (8, side_px, side_px, 3), dtype=torch.uint8).numpy())
        files["ONNX int8"] = runtimes.run_onnx(runtimes.quantise(path, folder / "model.int8.onnx", views, metadata))
        files["OpenVINO"] = runtimes.run_openvino(runtimes.write_openvino(path, folder / "model.xml", metadata))
    except LaunchError as error:
        print(f"left out: {error.found}; {error.remedy}")
    network.to(memory_format=torch.channels_last)  # as `wasteddp predict` runs it

    def pytorch(images_BHWC: Any) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(images_BHWC))

    return {"PyTorch": pytorch, **files}, side_px, card.arch
