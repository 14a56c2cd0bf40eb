"""Writes checkpoints in a thread. The loop waits only for the copy of the tensors, and on a GPU not even for that.

The thread writes and syncs the files, renames the folder, syncs its parent, and then removes old checkpoints. At the
next start `recover` removes or restores what a kill left unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from safetensors.torch import save

from wasteddp.errors import StorageError, storage
from wasteddp.files import sync_folder
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.checkpoint.reader import (
    COMPLETE,
    FORMAT,
    FORMAT_VERSION,
    PROGRESS,
    SETTINGS,
    STATE_SUFFIX,
    States,
    listed,
    step_of,
)
from wasteddp.training.checkpoint.state import Fetch, StateCopy


class CheckpointWriter:
    """Writes into `runs/<name>/checkpoints`, which must exist. Rank 0 only.

    Args:
        folder: the folder of the checkpoints.
        keep_last: number of newest checkpoints to keep, in addition to the best.
        keep_every: keep one checkpoint permanently for every `keep_every` steps; 0: none.
        say: receives lines for the log, such as that the loop waits for a copy.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, keep_every: int = 0, say: Callable[[str], object] = print
    ) -> None:
        self._folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._work: Callable[[], None] = lambda: None
        self._copy = StateCopy(say)
        self._started_at = 0.0
        self.seconds: float | None = None  # that the last checkpoint took, from the call of `save` until it was on disk

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written; a save would wait for it."""
        return self._pending is not None and not self._pending.done()

    def save(
        self,
        progress: Progress,
        states: States,
        settings_yaml: str,
        *,
        before: Callable[[States], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> None:
        """Copy the tensors, or launch their copy, and return; a thread writes the copy.

        Args:
            states: named states, including "model" and "optimizer".
            before: called in that thread with the copies, before the checkpoint is written. After a kill between the
                two, the run resumes from the previous checkpoint and reaches the same step again.
            after: called in that thread when the checkpoint is on disk.

        Raises:
            StorageError: the previous save failed. Complete checkpoints are not affected.
        """
        self.wait()
        self._work = partial(self._keep, progress, self._copy.begin(states), settings_yaml, before, after)
        self.again()

    def again(self) -> None:
        """Retry the last save, after it failed."""
        self._started_at = time.perf_counter()
        self._pending = self._thread.submit(self._work)

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            StorageError: the save failed.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Wait for the last save, and stop the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=True)

    def _keep(
        self,
        progress: Progress,
        fetch: Fetch,
        settings_yaml: str,
        before: Callable[[States], object] | None,
        after: Callable[[], object] | None,
    ) -> None:
        # contiguous: safetensors refuses channels-last
        states = {
            name: {inner_name(key): tensor.contiguous() for key, tensor in state.items()}
            for name, state in fetch().items()
        }
        if before:
            before(states)
        try:
            self._write(progress, states, settings_yaml)
        except StorageError:  # free the space on a full disk
            shutil.rmtree(_temporary(self._folder / f"step-{progress.step:08d}"), ignore_errors=True)
            raise
        self.seconds = time.perf_counter() - self._started_at
        if after:
            after()

    def _write(self, progress: Progress, states: States, settings_yaml: str) -> None:
        final = self._folder / f"step-{progress.step:08d}"
        temporary, replaced = _temporary(final), _replaced(final)
        with storage("writing a checkpoint", final):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            contents = {f"{name}{STATE_SUFFIX}": save(state) for name, state in states.items()}
            contents[PROGRESS] = json.dumps(asdict(progress), indent=1).encode()
            contents[SETTINGS] = settings_yaml.encode()
            sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
            complete = {"format": FORMAT, "format_version": FORMAT_VERSION, "sha256": sha256}
            for name, content in {**contents, COMPLETE: json.dumps(complete, indent=1).encode()}.items():
                with (temporary / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(temporary)
            if final.exists():  # the same step again: the run stopped before its first step, or the old one is damaged
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)  # after a kill here, `recover` restores it
            temporary.rename(final)
            sync_folder(self._folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune(progress)

    def _prune(self, progress: Progress) -> None:
        # Newer checkpoints are damaged, or the run would have resumed from them. They must not count among the newest,
        # or the intact ones would be removed.
        there = {step_of(path): path for path in listed(self._folder) if step_of(path) <= progress.step}
        kept = kept_steps(
            list(there), keep_last=self._keep_last, keep_every=self._keep_every, best_step=progress.best_step
        )
        for step in there.keys() - kept:
            # renamed first: a kill in the middle of the removal must not leave half a checkpoint under its name
            there[step].rename(_temporary(there[step]))
            shutil.rmtree(_temporary(there[step]))


def kept_steps(steps: Sequence[int], *, keep_last: int, keep_every: int, best_step: int) -> set[int]:
    """Return which of the checkpoints of `steps`, oldest first, are kept.

    These are the newest, the best, and the first in every `keep_every` steps: of 10, 20, 30, 40, 50 with `keep_every`
    20 these are 20 and 40. So they are about `keep_every` steps apart, even if the run was saved irregularly.
    """
    kept = {*steps[-keep_last:], best_step}
    if keep_every:
        last = 0
        for step in steps:
            if step // keep_every > last:
                last = step // keep_every
                kept.add(step)
    return kept


def recover(folder: Path) -> None:
    """Remove what a kill left, and restore a checkpoint that was being replaced. Requires the lock on the folder."""
    for final in {folder / path.name.split(".")[1] for path in folder.glob(".step-*.tmp")}:
        if _replaced(final).exists() and not final.exists():
            _replaced(final).rename(final)
        shutil.rmtree(_temporary(final), ignore_errors=True)
        shutil.rmtree(_replaced(final), ignore_errors=True)


def refuse_full_disk(folder: Path, num_bytes: int) -> None:
    """Raise a StorageError if the disk of `folder` has less than `num_bytes` free."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise StorageError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free; the checkpoints take {num_bytes / 1e6:,.0f} MB",
            "a later save would fail",
            "free some space, set run.out to a folder on another disk, or lower checkpoint.keep_last",
        )


def inner_name(key: str) -> str:
    """Return a tensor's name without the prefixes of DDP and `torch.compile`.

    In "momentum_buffer:module.fc.weight" the parameter's name is after the colon.
    """
    prefix, colon, name = key.rpartition(":")
    return prefix + colon + name.replace("_orig_mod.", "").removeprefix("module.")


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced.tmp")
