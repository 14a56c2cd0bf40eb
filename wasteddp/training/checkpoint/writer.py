"""Writes checkpoints in a thread: the loop waits for the copy of the tensors only, and on a GPU not even for that.

A thread writes, syncs, renames, syncs the folder, and prunes after that; what a kill leaves half-done is cleared, or
put back, by `recover` at the next start.
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
from wasteddp.training.checkpoint.reader import (
    COMPLETE,
    FORMAT,
    FORMAT_VERSION,
    PROGRESS,
    SETTINGS,
    STATE_SUFFIX,
    Progress,
    States,
    listed,
    step_of,
)
from wasteddp.training.checkpoint.state_copy import Fetch, StateCopy


class CheckpointWriter:
    """Writes into `runs/<name>/checkpoints`, which exists. Rank 0 only.

    Args:
        folder: of the checkpoints.
        keep_last: newest ones kept, besides the best.
        keep_every: of every so many steps one is kept permanently; 0: none.
        say: takes a line about the run, such as that a copy has to be waited for.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, keep_every: int = 0, say: Callable[[str], object] = print
    ) -> None:
        self._folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._work: Callable[[], None] = lambda: None
        self._copy = StateCopy(say)
        self._handed_over_at = 0.0
        self.seconds: float | None = None  # that the last checkpoint took from being handed over to lying on the disk

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
        """Copies the tensors, or launches their copy, and returns; the copy is written by a thread.

        Args:
            states: named states; "model" and "optimizer" must be among them.
            before: called in that thread with the copies, before the checkpoint is written: after a kill between
                the two, the run goes on from the checkpoint before and comes to the same place again.
            after: called in that thread once the checkpoint is on the disk.

        Raises:
            StorageError: the save before this one failed. What was complete before it is untouched.
        """
        self.wait()
        self._work = partial(self._keep, progress, self._copy.begin(states), settings_yaml, before, after)
        self.again()

    def again(self) -> None:
        """Hands over again what was handed over last: after a save that failed."""
        self._handed_over_at = time.perf_counter()
        self._pending = self._thread.submit(self._work)

    def wait(self) -> None:
        """Until what was handed over is on the disk.

        Raises:
            StorageError: it is not, and will not be.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """As `wait`, for the last time."""
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
        except StorageError:  # a full disk needs its space back
            shutil.rmtree(_temporary(self._folder / f"step-{progress.step:08d}"), ignore_errors=True)
            raise
        self.seconds = time.perf_counter() - self._handed_over_at
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
            if final.exists():  # the same step again: stopped before the first step, or the old one is damaged
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)  # a kill after this line: `recover` puts it back
            temporary.rename(final)
            sync_folder(self._folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune(progress)

    def _prune(self, progress: Progress) -> None:
        # Newer ones are damaged, or the run would have gone on from them: counted among the newest, they would push
        # out the whole ones.
        there = {step_of(path): path for path in listed(self._folder) if step_of(path) <= progress.step}
        kept = kept_steps(
            list(there), keep_last=self._keep_last, keep_every=self._keep_every, best_step=progress.best_step
        )
        for step in there.keys() - kept:
            # renamed first: a kill in the middle of the removal must not leave half a checkpoint under its name
            there[step].rename(_temporary(there[step]))
            shutil.rmtree(_temporary(there[step]))


def kept_steps(steps: Sequence[int], *, keep_last: int, keep_every: int, best_step: int) -> set[int]:
    """Which of the checkpoints of these steps, the oldest first, stay.

    The newest, the best, and the first of every `keep_every` steps: of 10, 20, 30, 40, 50 with `keep_every` 20 these
    are 20 and 40. So the ones kept are about `keep_every` apart however irregularly the run was saved.
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
    """Clears what a kill left, and puts back what was on its way to be replaced. Nobody else may write meanwhile."""
    for final in {folder / path.name.split(".")[1] for path in folder.glob(".step-*.tmp")}:
        if _replaced(final).exists() and not final.exists():
            _replaced(final).rename(final)
        shutil.rmtree(_temporary(final), ignore_errors=True)
        shutil.rmtree(_replaced(final), ignore_errors=True)


def refuse_full_disk(folder: Path, num_bytes: int) -> None:
    """Raises a StorageError if the disk of `folder` has no room for `num_bytes`."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise StorageError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free; the checkpoints take {num_bytes / 1e6:,.0f} MB",
            "the run would end at one of its saves",
            "free some space, set run.out to a folder on another disk, or lower checkpoint.keep_last",
        )


def inner_name(key: str) -> str:
    """A tensor's name as the bare network has it, without what DDP and `torch.compile` put before it.

    In "momentum_buffer:module.fc.weight" the parameter's name is after the colon.
    """
    prefix, colon, name = key.rpartition(":")
    return prefix + colon + name.replace("_orig_mod.", "").removeprefix("module.")


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced.tmp")
