"""python -m launch.bench loader: images/s of the loader and of other loaders, two workers, shuffled crops of 224 px.

Each side runs in its own process, in turns, and is timed for some seconds after its first batches. All sides do
RandomResizedCrop (8 to 100 % of the area) with antialiasing on the same JPEGs:

    wasteddp        shards -> uint8 batches; the device flips, with the rest of the augmentation
    v2 tensors      torchvision: decode_image, transforms.v2 crop and flip on uint8 tensors, DataLoader
    ImageFolder     torchvision: Pillow, transforms crop and flip, ToTensor, DataLoader
    webdataset      the same transforms after webdataset.WebDataset on the same tars, DataLoader
    decode alone    libjpeg-turbo on bytes in memory, two processes; whole images, no crop, no batch. A loader that
                    decodes large photographs at a fraction of their size can be faster
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from launch import ROOT
from launch.benchmarks.datasets import unpack

WORKERS, IMAGE_SIZE_PX = 2, 224
CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
NUM_PHOTOS, PHOTO_SIZE_PX = 40, (3000, 4000)  # H, W: 12 megapixels


def add(commands: Any) -> None:
    """Add the subcommand to `launch.bench`."""
    command = commands.add_parser("loader", help="the loader and other loaders on the same JPEGs")
    command.set_defaults(run=compare)
    command.add_argument("--shards", default="shards/trashnet", help="set whose training images all sides read")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--seconds", type=float, default=4.0, help="timed of each side in each round")


def compare(arguments: argparse.Namespace) -> None:
    """Print a line for each side: the median of its rounds, and wasteddp relative to it."""
    shards, rounds, seconds = arguments.shards, arguments.rounds, arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        own, photos = Path(folder, "own"), Path(folder, "photos")
        unpack(Path(shards), own / "images", split="train")
        _draw_photos(photos / "images")
        for root, name, batch in ((own, f"the training images of {shards}", 64), (photos, "12-megapixel photos", 16)):
            # several tars: webdataset needs at least one per worker
            size_mb = sum(path.stat().st_size for path in root.rglob("*.jpg")) / 1e6 / 8
            made = ["shard", str(root / "images"), "--out", str(root / "shards"), "--fractions", "1,0,0"]
            _run("wasteddp.cli", *made, "--shard-mb", f"{size_mb:.3f}")
            found: dict[str, list[float]] = {side: [] for side in SIDES}
            for number in range(rounds):
                for side in list(SIDES) if number % 2 == 0 else reversed(SIDES):
                    printed = _run("launch.benchmarks.loader", side, str(root), str(batch), str(seconds))
                    found[side].append(float(json.loads(printed.splitlines()[-1])))
            print(f"{name}, batches of {batch}, {WORKERS} workers, median of {rounds}")
            ours = statistics.median(found["wasteddp"])
            for side, rates in found.items():
                middle = statistics.median(rates)
                print(f"  {side:13s} {middle:8.1f} images/s   wasteddp is {ours / middle:5.2f} of it", flush=True)


def _run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def _draw_photos(out: Path) -> None:
    """Draw JPEGs of 3.5 MB: soft colours with sensor noise, so that they take as long to decode as photographs."""
    import simplejpeg

    generator = np.random.default_rng(0)
    height, width = PHOTO_SIZE_PX
    for number in range(NUM_PHOTOS):
        coarse = generator.integers(40, 216, (24, 32, 3))
        soft = np.kron(coarse, np.ones((height // 24, width // 32, 1), np.int64))
        grain = generator.normal(0, 6, (height, width, 1))
        pixels = (soft + grain).clip(0, 255).astype(np.uint8)
        path = out / ("glass" if number % 2 else "paper") / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420"))


# --- the sides: infinite iterators over the number of images of each batch


def _wasteddp(root: Path, batch: int) -> Iterator[int]:
    from wasteddp.data.loader import training_loader, training_steps
    from wasteddp.data.manifest import Manifest
    from wasteddp.data.reader import SplitReader
    from wasteddp.order.plan import TrainPlan

    with SplitReader(Manifest.load(root / "shards"), "train") as reader:
        plan = TrainPlan(num_samples=reader.num_samples, global_batch=batch, seed=0, lanes=batch)
        loader = training_loader(
            reader,
            seed=0,
            image_size_px=IMAGE_SIZE_PX,
            crop_scale=CROP_SCALE,
            crop_ratio=CROP_RATIO,
            workers=WORKERS,
            prefetch=2,
            pin_memory=False,
        )
        with loader:
            for made in loader.batches(training_steps(plan, 0, 1_000_000, rank=0, world_size=1)):
                yield len(made.samples)


def _v2_tensors(root: Path, batch: int) -> Iterator[int]:
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(IMAGE_SIZE_PX, scale=CROP_SCALE, ratio=CROP_RATIO, antialias=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def load(path: str) -> Any:
        return decode_image(path, mode=ImageReadMode.RGB)

    return _torch_batches(ImageFolder(str(root / "images"), transform, loader=load), batch, shuffle=True)


def _image_folder(root: Path, batch: int) -> Iterator[int]:
    from torchvision.datasets import ImageFolder

    return _torch_batches(ImageFolder(str(root / "images"), _pillow_transform()), batch, shuffle=True)


def _webdataset(root: Path, batch: int) -> Iterator[int]:
    import webdataset

    tars = sorted(str(path) for path in (root / "shards").glob("train-*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=100, empty_check=False).shuffle(200).decode("pil")
    dataset = dataset.to_tuple("jpg", "json").map_tuple(_pillow_transform(), lambda text: text["label"])
    return _torch_batches(dataset, batch, shuffle=False)


def _pillow_transform() -> Any:
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(IMAGE_SIZE_PX, scale=CROP_SCALE, ratio=CROP_RATIO)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])


def _torch_batches(dataset: Any, batch: int, *, shuffle: bool) -> Iterator[int]:
    from torch.utils.data import DataLoader

    loader = DataLoader(dataset, batch, shuffle=shuffle, num_workers=WORKERS, persistent_workers=True, drop_last=True)
    while True:
        for images, _ in loader:
            yield len(images)


SIDES: dict[str, Callable[[Path, int], Iterator[int]] | None] = {
    "wasteddp": _wasteddp,
    "v2 tensors": _v2_tensors,
    "ImageFolder": _image_folder,
    "webdataset": _webdataset,
    "decode alone": None,
}


def _rate(side: str, root: Path, batch: int, seconds: float) -> float:
    """Return the images/s of one side."""
    make = SIDES[side]
    if make is None:
        with ProcessPoolExecutor(WORKERS) as pool:
            return sum(pool.map(_decode_alone, [root] * WORKERS, [seconds] * WORKERS))
    batches = make(root, batch)
    for _ in range(4):  # processes start, caches fill
        next(batches)
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        images += next(batches)
    return images / (time.perf_counter() - began)


def _decode_alone(root: Path, seconds: float) -> float:
    import simplejpeg

    files = [path.read_bytes() for path in sorted(root.glob("images/*/*.jpg"))[:400]]
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        simplejpeg.decode_jpeg(files[images % len(files)])
        images += 1
    return images / (time.perf_counter() - began)


if __name__ == "__main__":
    side, root, batch, seconds = sys.argv[1:]
    print(json.dumps(_rate(side, Path(root), int(batch), float(seconds))))
