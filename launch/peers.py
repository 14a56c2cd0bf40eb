"""Uneven shards at two ranks: plain webdataset and accelerate, compared with this program.

    python -m launch.peers

Draws 22 images into two shards of 15 and 7, then starts two real processes on the CPU with `accelerate launch`. Each
method reads one epoch in batches of 2 and does one all-reduce per step, as a training does; each rank records the
samples that it saw. A rank that waits for the other longer than the time limit counts as hung: a training would wait
for its own time limit, by default 10 minutes or more, and fail.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARDS = (15, 7)
BATCH = 2  # of a rank
TIME_LIMIT_S = 8
TOGETHER = "both at the same step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-of", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        run_rank(arguments.rank_of)
    else:
        print(compare())


def compare() -> str:
    """Start the two ranks and return the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder)
        config = ROOT / "launch" / "accelerate" / "cpu2.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
        done = subprocess.run(
            [*command, str(Path(__file__).resolve()), "--rank-of", name], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"the two processes ended with {done.returncode}:\n{done.stderr[-3000:]}")
        ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    lines = [
        f"{sum(SHARDS)} samples in shards of {' and '.join(map(str, SHARDS))}, 2 ranks, batches of {BATCH} per rank\n",
        "| method | steps of the ranks | seen | lost | seen twice or more | ended |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for way in WAYS:
        seen = [sample for rank in ranks for sample in rank[way]["samples"]]
        distinct = len(set(seen))
        ended = max((rank[way]["ended"] for rank in ranks), key=lambda text: text != TOGETHER)
        steps = " and ".join(str(rank[way]["steps"]) for rank in ranks)
        lines.append(f"| {way} | {steps} | {distinct} | {sum(SHARDS) - distinct} | {len(seen) - distinct} | {ended} |")
    return "\n".join(lines)


def write_shards(folder: Path) -> None:
    """Write two tars of drawn images, labelled by number, with the index of wasteddp."""
    import webdataset
    from PIL import Image

    from wasteddp.sharding.index import index_folder

    number = 0
    for shard, size in enumerate(SHARDS):
        with webdataset.TarWriter(str(folder / f"train-{shard:06d}.tar"), mtime=0) as writer:
            for _ in range(size):
                buffer = io.BytesIO()
                pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "JPEG")
                writer.write({"__key__": f"{number:04d}", "jpg": buffer.getvalue(), "cls": number % 2})
                number += 1
    index_folder(folder, workers=1, classes=("even", "odd"))


# --- one of the two ranks ---------------------------------------------------------------------------------------------


def run_rank(folder: Path) -> None:
    """Run all methods one after the other. Write the samples that this rank saw to `rank-<n>.json`."""
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    noted: dict[str, dict[str, Any]] = {}
    for way, batches_of in WAYS.items():
        # its own group: after a timeout a group cannot be used again
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIME_LIMIT_S))
        note: dict[str, Any] = {"samples": [], "steps": 0, "ended": TOGETHER}
        noted[way] = note
        try:
            for samples in batches_of(folder, accelerator):
                dist.all_reduce(torch.zeros(1), group=group)  # where DDP would average the gradients
                note["samples"] += samples
                note["steps"] += 1
        except (RuntimeError, ValueError) as error:
            late = "imed out" in str(error) or "onnection" in str(error)
            note["ended"] = f"hung: stopped after {TIME_LIMIT_S} s" if late else f"failed: {str(error)[:60]}"
        (folder / f"rank-{accelerator.process_index}.json").write_text(json.dumps(noted))
        accelerator.wait_for_everyone()


def _webdataset(folder: Path, **split: Any) -> Any:
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    warnings.simplefilter("ignore")
    stream = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False, **split)
    return stream.map(lambda sample: int(sample["__key__"]))


def _loaded(stream: Any) -> Any:
    import torch

    return torch.utils.data.DataLoader(stream, batch_size=BATCH)


def _numbers(loader: Any) -> Iterator[list[int]]:
    for batch in loader:
        yield batch.tolist()


def split_by_node(folder: Path, accelerator: Any) -> Iterator[list[int]]:
    """webdataset's own split of the shards, without `prepare`."""
    import webdataset

    return _numbers(_loaded(_webdataset(folder, nodesplitter=webdataset.split_by_node)))


def split_and_prepared(folder: Path, accelerator: Any) -> Iterator[list[int]]:
    """The same with `accelerator.prepare`, as in its examples: rank 0 reads and sends to all."""
    import webdataset

    return _numbers(accelerator.prepare(_loaded(_webdataset(folder, nodesplitter=webdataset.split_by_node))))


def split_and_not_dispatched(folder: Path, accelerator: Any) -> Iterator[list[int]]:
    """The same with `dispatch_batches=False`: it splits the split shards again."""
    import webdataset
    from accelerate.data_loader import prepare_data_loader

    loader = _loaded(_webdataset(folder, nodesplitter=webdataset.split_by_node))
    return _numbers(prepare_data_loader(loader, put_on_device=False, dispatch_batches=False))


def unsplit_and_prepared(folder: Path, accelerator: Any) -> Iterator[list[int]]:
    """Without webdataset's split, only accelerate's: rank 0 reads and decodes everything for all ranks."""
    return _numbers(accelerator.prepare(_loaded(_webdataset(folder, nodesplitter=None))))


def resampled(folder: Path, accelerator: Any) -> Iterator[list[int]]:
    """webdataset's remedy for uneven shards: draw shards with replacement, end each rank after its share of steps."""
    steps = sum(SHARDS) // (2 * BATCH)
    return _numbers(_loaded(_webdataset(folder, resampled=True, nodesplitter=None).with_epoch(steps * BATCH)))


def ours(folder: Path, accelerator: Any) -> Iterator[list[int]]:
    from wasteddp.data.loader import training_loader, training_steps
    from wasteddp.data.manifest import Manifest
    from wasteddp.data.reader import SplitReader
    from wasteddp.order.plan import TrainPlan

    rank, world_size = accelerator.process_index, accelerator.num_processes
    with SplitReader(Manifest.load(folder), "train") as reader:
        plan = TrainPlan(reader.num_samples, world_size * BATCH, 0, world_size * BATCH)
        with training_loader(
            reader,
            seed=0,
            image_size_px=32,
            crop_scale=(0.35, 1.0),
            crop_ratio=(0.75, 1.33),
            workers=1,
            prefetch=1,
            pin_memory=False,
        ) as loader:
            steps = training_steps(plan, 0, plan.steps_per_epoch, rank=rank, world_size=world_size)
            for batch in loader.batches(steps):
                yield batch.read_B.tolist()


WAYS: dict[str, Callable[[Path, Any], Iterator[list[int]]]] = {
    "webdataset, split_by_node": split_by_node,
    "the same through accelerator.prepare": split_and_prepared,
    "the same, dispatch_batches=False": split_and_not_dispatched,
    "webdataset unsplit, accelerator.prepare": unsplit_and_prepared,
    "webdataset, resampled=True and with_epoch": resampled,
    "wasteddp": ours,
}


if __name__ == "__main__":
    if __package__ in (None, ""):
        sys.path[0] = str(ROOT)  # the launcher runs this file: use the checkout, not this folder
    main()
