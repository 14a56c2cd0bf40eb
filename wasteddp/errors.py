"""Every error that a user can cause or meet, in one tree, and how it is said.

    WastedError                what was found; what would go wrong; what to do
    ├── SettingsError          the YAML or --set
    ├── SourceError            the images that are to be sharded
    ├── RecipeError            a recipe, or a download it asks for
    ├── ShardError             a shard set: manifest, index or tar
    │   ├── DamagedSampleError one sample of it
    │   ├── DamagedShardError  one tar of a remote set that is missing, cut or not the one of the manifest
    │   └── RemoteError        a store that cannot be reached, or refuses
    ├── WeightsError           initial weights
    ├── LaunchError            processes, devices, precision
    ├── WorkerError            decoding processes that cannot be kept alive
    ├── DeviceMemoryError      a GPU that cannot take as many images at once
    ├── CheckpointError        a run's checkpoints
    ├── DivergedError          a loss that is no number any more
    ├── CoverageError          an epoch that did not see each of its samples exactly once
    ├── BundleError            a model bundle
    ├── RunError               a run's folder
    ├── TrackingError          W&B, when a command asks for it; a training goes on without
    ├── StoppedError           a wait for a store that was ended because the run is to save and leave: nobody's mistake
    ├── TextError              a text file that is not in UTF-8
    └── StorageError           disk full, no permission, no such place

A user's mistake ends with the message and exit code 2, never with a traceback.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

EXIT_FINISHED = 0
EXIT_USER_ERROR = 2
EXIT_FAILED = 70  # EX_SOFTWARE of sysexits.h: a rank failed, hung or vanished, and all were stopped
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, saved, start it again


class WastedError(Exception):
    """Something that the user can fix, said in three parts.

    Args:
        found: what is the case, with numbers and paths.
        consequence: what would go wrong if the program went on.
        remedy: what to do about it.
    """

    def __init__(self, found: str, consequence: str = "", remedy: str = "") -> None:
        super().__init__(found, consequence, remedy)
        self.found, self.consequence, self.remedy = found, consequence, remedy

    def __str__(self) -> str:
        lines = [self.found, self.consequence and f"  so: {self.consequence}", self.remedy and f"  do: {self.remedy}"]
        return "\n".join(line for line in lines if line)


class SettingsError(WastedError):
    pass


class SourceError(WastedError):
    pass


class RecipeError(WastedError):
    pass


class ShardError(WastedError):
    pass


class DamagedSampleError(ShardError):
    pass


class DamagedShardError(ShardError):
    pass


class RemoteError(ShardError):
    pass


class WeightsError(WastedError):
    pass


class LaunchError(WastedError):
    pass


class WorkerError(WastedError):
    """The decoding processes cannot be kept alive."""


class DeviceMemoryError(WastedError):
    pass


class CheckpointError(WastedError):
    pass


class DivergedError(WastedError):
    pass


class CoverageError(WastedError):
    pass


class BundleError(WastedError):
    pass


class RunError(WastedError):
    pass


class TrackingError(WastedError):
    pass


class StoppedError(WastedError):
    pass


class TextError(WastedError):
    pass


class StorageError(WastedError):
    pass


_STORAGE_REMEDIES = {
    errno.ENOSPC: "free some space, or name a folder on another disk; what was complete before is untouched",
    errno.EDQUOT: "your quota is used up: free some space, or name a folder on another disk",
    errno.EACCES: "give yourself write permission there, or name another folder",
    errno.EPERM: "give yourself write permission there, or name another folder",
    errno.EROFS: "this file system is read-only: name another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is a file, not a folder: name another folder",
    errno.EISDIR: "this path is a folder where a file is wanted: name another path",
}


@contextmanager
def storage(doing: str, path: str | Path) -> Iterator[None]:
    """Turns an `OSError` of the block into a `StorageError`; `doing` is a phrase such as "writing a checkpoint"."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or str(error)
        remedy = _STORAGE_REMEDIES.get(error.errno or 0, "see the reason above")
        raise StorageError(f"{doing}: {reason}: {where}", f"{path} cannot be used as it is", remedy) from error


def exit_with(error: WastedError, *, speak: bool = True) -> NoReturn:
    """Ends the process with the message and code 2; `speak` is false on all ranks but the one that tells the user."""
    if speak:
        print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_USER_ERROR)
