"""Checks of a run before it starts: its shards, space and time for checkpoints, W&B."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wasteddp.data.dataset import open_dataset
from wasteddp.data.decoding.decode import UndecodableError, decode_rgb
from wasteddp.data.manifest import Manifest
from wasteddp.data.train_plan import plan_training
from wasteddp.errors import WastedError, storage
from wasteddp.files import sync_folder, try_lock
from wasteddp.inference.bundle import find_bundle, load_bundle
from wasteddp.model import networks
from wasteddp.settings import Settings
from wasteddp.tools.machine_checks import Finding
from wasteddp.training.build_model import make_initial
from wasteddp.training.checkpoint import reader
from wasteddp.training.checkpoint.progress import Lineage, accepted_changes, changed_settings, refuse_finished
from wasteddp.training.dataloaders import refuse_shared, refuse_untrainable
from wasteddp.training.tracking import wandb_client

_SAMPLES = 64
_CHUNK_BYTES = 1 << 24


def model_bytes(arch: str, num_classes: int) -> int:
    """Return the bytes of the weights and statistics, without allocating them."""
    return sum(tensor.nbytes for tensor in networks.build_shapes(arch, num_classes).state_dict().values())


@dataclass(frozen=True, slots=True)
class Opened:
    """What is known of a shard set after it was opened."""

    manifest: Manifest
    steps_per_epoch: int


def check_shards(settings: Settings, rank: int) -> tuple[Finding, Opened | None]:
    """Open the shard set as a run does, and check the hash and decoding of a few images that differ by rank.

    Of a set behind a URL only the first shard of each split is fetched, into the cache of the run.

    Returns:
        The finding, and what the other checks need if the set can be read.
    """
    began, read_bytes = time.perf_counter(), 0
    names = (settings.data.train_split, settings.data.eval_split)
    try:
        with open_dataset(settings.data, rank=rank) as shards:
            manifest = shards.manifest
            refuse_shared(manifest, *names)
            for name in names:
                with shards.reader(name) as reader:
                    if name == settings.data.train_split:
                        refuse_untrainable(manifest, name)
                        plan = plan_training(
                            manifest.split(name),
                            settings.data,
                            reader.labels,
                            batch_size=settings.train.batch_size,
                            seed=settings.run.seed,
                        )
                    among = manifest.split(name).shards[0].num_samples if manifest.url else reader.num_samples
                    count = min(_SAMPLES, among)
                    for number in range(count):
                        sample = (number * among // count + rank) % among
                        data = reader.read(sample)
                        try:
                            decode_rgb(data)
                        except UndecodableError as error:
                            return _bad_shards(f"{reader.describe(sample)}: {error}", settings.data.shards), None
                        read_bytes += len(data)
    except WastedError as error:
        return _red("shards", error), None
    splits = ", ".join(f"{manifest.splits[name].num_samples} {name}" for name in names)
    speed = read_bytes / 1e6 / (time.perf_counter() - began)
    found = (
        f"{manifest.name}: {splits} images; sizes are right; up to {_SAMPLES} of each split read, hashed and decoded"
    )
    return Finding("shards", "green", f"{found}, {speed:.0f} MB/s"), Opened(manifest, plan.steps_per_epoch)


def _red(check: str, error: WastedError) -> Finding:
    return Finding(check, "red", error.found, error.remedy)


def _bad_shards(found: str, shards: str) -> Finding:
    return Finding("shards", "red", found, f"list all damage: wasteddp verify {shards}")


def check_weights(settings: Settings, classes: Sequence[str]) -> Finding:
    """Load the initial weights, and the teacher's, as a run does: it may download them."""
    try:
        _, origin = make_initial(settings, classes)
        if settings.train.teacher:
            load_bundle(find_bundle(Path(settings.train.teacher)))
    except WastedError as error:
        return _red("weights", error)
    return Finding("weights", "green", origin)


def check_folder(settings: Settings, opened: Opened) -> Finding:
    """Check that the run can start, or continue, in its folder with these settings."""
    folder = Path(settings.run.out)
    damaged: list[str] = []
    try:
        checkpoint = reader.newest(folder / reader.FOLDER, damaged.append)
        if not checkpoint:
            return Finding("folder", "green", f"{folder}: a new run")
        then = checkpoint.progress
        now = Lineage.of(settings, opened.manifest, teacher=then.lineage.teacher if settings.train.teacher else "")
        accepted_changes(then.lineage, now, (), where=checkpoint.path)
        changes = changed_settings(checkpoint.settings_yaml, settings)
        all_steps = opened.steps_per_epoch * settings.train.epochs
        last_step = min(all_steps, settings.train.stop_at_step or all_steps)
        if then.step >= last_step:
            refuse_finished(changes, run=str(folder), step=then.step)
            changes = ["the run is finished, so nothing would be trained"]
    except WastedError as error:
        return _red("folder", error)
    found = f"{folder}: continues from step {then.step} of {last_step}"
    if lines := [*damaged, *changes]:
        return Finding("folder", "yellow", f"{found}; {'; '.join(lines)}", "check that this is meant")
    return Finding("folder", "green", found)


def check_file_system(folder: Path) -> Finding:
    """Try the calls that keep the files of a run safe: locks, and the sync of a folder."""
    try:
        with _test_folder(folder), tempfile.TemporaryFile(dir=folder) as file:
            try_lock(file.fileno())
            is_synced = sync_folder(folder)
    except WastedError as error:
        return _red("file system", error)
    except OSError as error:
        found = f"files in {folder} cannot be locked: {error.strerror}"
        return Finding("file system", "yellow", found, "a file that is touched every 5 s marks a run as in use instead")
    if not is_synced:
        found = f"the folder {folder} cannot be synced"
        return Finding("file system", "yellow", found, "after a power cut, continue from an older checkpoint if needed")
    return Finding("file system", "green", f"{folder}: files can be locked, and folders synced")


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
        return _red("saving", error)
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
    with _test_folder(folder), storage("writing a test file", folder), tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for at in range(0, num_bytes, _CHUNK_BYTES):
            file.write(chunk[: num_bytes - at])
        file.flush()
        os.fsync(file.fileno())
        return max(time.perf_counter() - began, 1e-6)


@contextmanager
def _test_folder(folder: Path) -> Iterator[None]:
    """Create a folder, and remove it after the block if it was not there."""
    existed = folder.exists()
    with storage("making the run's folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
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
