"""Checks of a run before it starts: its shards, space and time for checkpoints, W&B."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from wasteddp.data.decoding.decode import UndecodableError, decode_rgb
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.errors import WastedError, storage
from wasteddp.model import resnet
from wasteddp.settings import Settings
from wasteddp.tools.finding import Finding
from wasteddp.training.tracking import wandb_client

_SAMPLES = 64
_CHUNK_BYTES = 1 << 24


def model_bytes(settings: Settings, num_classes: int) -> int:
    """Return the bytes of the weights and statistics, without allocating them."""
    with torch.device("meta"):
        return sum(tensor.nbytes for tensor in resnet.build(settings.model.arch, num_classes).state_dict().values())


def check_shards(settings: Settings, rank: int) -> tuple[Finding, int]:
    """Check the manifest, the size of every tar, and the hash and decoding of a few images that differ by rank.

    Returns:
        The finding, and the number of classes; 0 if the manifest cannot be read.
    """
    began, read_bytes = time.perf_counter(), 0
    try:
        manifest = Manifest.load(settings.data.shards)
        names = (settings.data.train_split, settings.data.eval_split)
        for name in names:
            with SplitReader(manifest, name) as reader:
                count = min(_SAMPLES, reader.num_samples)
                for number in range(count):
                    sample = (number * reader.num_samples // count + rank) % reader.num_samples
                    data = reader.read(sample)
                    try:
                        decode_rgb(data)
                    except UndecodableError as error:
                        return _bad_shards(f"{reader.describe(sample)}: {error}", settings), 0
                    read_bytes += len(data)
    except WastedError as error:
        return Finding("shards", "red", error.found, error.remedy), 0
    splits = ", ".join(f"{manifest.splits[name].num_samples} {name}" for name in names)
    speed = read_bytes / 1e6 / (time.perf_counter() - began)
    found = (
        f"{manifest.name}: {splits} images; sizes are right; up to {_SAMPLES} of each split read, hashed and decoded"
    )
    return Finding("shards", "green", f"{found}, {speed:.0f} MB/s"), len(manifest.classes)


def _bad_shards(found: str, settings: Settings) -> Finding:
    return Finding("shards", "red", found, f"list all damage: wasteddp verify {settings.data.shards}")


def check_disk(folder: Path, num_bytes: int) -> Finding:
    """Check the space for the checkpoints and the model that a run keeps."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder}: {free / 1e9:.1f} GB free; checkpoints and model take {num_bytes / 1e9:.2f} GB"
    if free < num_bytes:
        return Finding("disk", "red", found, "free space, set run.out to another disk, or lower checkpoint.keep_last")
    if free < 3 * num_bytes:
        return Finding(
            "disk", "yellow", found, "enough for this run only; free some space before other programs fill the disk"
        )
    return Finding("disk", "green", found)


def check_save(folder: Path, num_bytes: int, leaves_s: float) -> Finding:
    """Write and sync as many bytes as a checkpoint, and compare the time with the time after a stop signal."""
    try:
        seconds = _seconds_to_write(folder, num_bytes)
    except WastedError as error:
        return Finding("saving", "red", error.found, error.remedy)
    # the save after a signal may first wait for a save in progress
    needed_s = 2 * seconds
    found = (
        f"a checkpoint of {num_bytes / 1e6:.0f} MB takes {seconds:.1f} s ({num_bytes / seconds / 1e6:.0f} MB/s); "
        f"a signal leaves {leaves_s:.0f} s"
    )
    remedy = (
        "give it more time (Slurm: #SBATCH --signal=B:USR1@SECONDS; otherwise TORCH_ELASTIC_SHUTDOWN_TIMEOUT), or set "
        "run.out to a faster disk"
    )
    if seconds > leaves_s:
        return Finding("saving", "red", f"{found}: the last state would be lost", remedy)
    if needed_s > leaves_s:
        return Finding("saving", "yellow", f"{found}: not enough during another save", remedy)
    return Finding("saving", "green", found)


def _seconds_to_write(folder: Path, num_bytes: int) -> float:
    chunk = os.urandom(_CHUNK_BYTES)  # some file systems would compress zeros
    with storage("writing a test file", folder):
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                began = time.perf_counter()
                for at in range(0, num_bytes, _CHUNK_BYTES):
                    file.write(chunk[: num_bytes - at])
                file.flush()
                os.fsync(file.fileno())
                return max(time.perf_counter() - began, 1e-6)
        finally:
            if not existed:
                folder.rmdir()


def check_wandb(mode: str) -> Finding:
    """Check the W&B mode of the run: never a prompt, and offline if online is impossible."""
    asked = wandb_client.asked_mode(mode)
    if asked == "disabled":
        return Finding("W&B", "green", "disabled, as set")
    chosen = wandb_client.choose(asked)
    if chosen.name == "offline" and asked == "online":
        remedy = "fix this, or send the run later as its log says"
        return Finding("W&B", "yellow", f"offline although track.wandb is online: {chosen.reason}", remedy)
    return Finding("W&B", "green", f"{chosen.name}: {chosen.reason}")
