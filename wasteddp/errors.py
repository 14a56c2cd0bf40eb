"""The errors that a user can cause or meet, as one tree of exceptions, and the exit codes of the commands.

    WastedError                what was found; what would go wrong; what to do
    ├── SettingsError          the YAML file or --set
    ├── SourceError            the images to shard
    ├── RecipeError            a recipe, or a download that it needs
    ├── ShardError             a shard set: manifest, index or tar
    │   ├── DamagedSampleError one sample of a set
    │   ├── DamagedShardError  a tar of a remote set that is missing, cut short or different from the manifest's
    │   └── RemoteError        a store that cannot be reached, or refuses the request
    ├── WeightsError           initial weights
    ├── LaunchError            processes, devices, precision
    ├── WorkerError            decoding processes that keep dying
    ├── DeviceMemoryError      a micro-batch that does not fit into the GPU's memory
    ├── CheckpointError        a run's checkpoints
    ├── DivergedError          a loss or gradient that is not finite, or a loss that exploded
    ├── CoverageError          an epoch that did not see each of its samples exactly once
    ├── DecisionError          bins, costs, or a guarantee that the images cannot give
    ├── BundleError            a model bundle
    ├── RunError               a run's folder
    ├── TrackingError          W&B, where a command needs it; training continues without it
    ├── StoppedError           a wait for a store that ended because the run must save and exit; not a user's mistake
    ├── TextError              a text file that is not in UTF-8
    └── StorageError           disk full, no permission, no such path

A user's mistake ends with its message and exit code 2, never with a traceback.
"""

from __future__ import annotations

import errno
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from wasteddp.redaction import redacted

EXIT_FINISHED = 0
EXIT_USER_ERROR = 2
EXIT_FAILED = 70  # EX_SOFTWARE of sysexits.h: a rank failed, hung or disappeared, and all ranks were stopped
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal after saving a checkpoint; start the run again

# C0 and C1 control characters but newline and tab, and the marks that turn the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def inert(text: str) -> str:
    """Return the text with escapes in place of the control characters that a terminal would interpret."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def visible(name: str) -> str:
    """Return the name of a class, in quotes and with escapes where two different names could look the same.

    These are names with characters that are not shown, with spaces at their ends or several in a row, and names that
    are not in Unicode's composed form (NFC).
    """
    is_plain = name.isprintable() and unicodedata.is_normalized("NFC", name) and " ".join(name.split()) == name
    return name if is_plain and name else ascii(name)


def joined(names: Iterable[str]) -> str:
    """Return the names of classes as a list for a message, each as `visible` shows it."""
    return ", ".join(map(visible, names))


class WastedError(Exception):
    """An error that the user can fix. Its message has three parts.

    Args:
        found: what was found, with numbers and paths.
        consequence: what would go wrong if the program continued.
        remedy: what the user can do.
    """

    def __init__(self, found: str, consequence: str = "", remedy: str = "") -> None:
        super().__init__(found, consequence, remedy)
        self.found, self.consequence, self.remedy = found, consequence, remedy

    def __str__(self) -> str:
        lines = [self.found, self.consequence and f"  so: {self.consequence}", self.remedy and f"  do: {self.remedy}"]
        return inert(redacted("\n".join(line for line in lines if line)))


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
    pass


class DeviceMemoryError(WastedError):
    pass


class CheckpointError(WastedError):
    pass


class DivergedError(WastedError):
    pass


class CoverageError(WastedError):
    pass


class DecisionError(WastedError):
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
    errno.ENOSPC: "free some space, or name a folder on another disk; files that were complete are unchanged",
    errno.EDQUOT: "your quota is used up: free some space, or name a folder on another disk",
    errno.EACCES: "give yourself write permission there, or name another folder",
    errno.EPERM: "give yourself write permission there, or name another folder",
    errno.EROFS: "this file system is read-only: name another folder",
    errno.ENOENT: "check the path",
    errno.EEXIST: "this path is a file, and a folder is needed: name another path",
    errno.ENOTDIR: "part of this path is a file, not a folder: name another folder",
    errno.ELOOP: "this path is a link, which is not followed here, or leads back to itself: remove it",
    errno.EISDIR: "this path is a folder, and a file is needed: name another path",
}


@contextmanager
def storage(doing: str, path: str | Path) -> Iterator[None]:
    """Convert an `OSError` of the block into a `StorageError`; `doing` is a phrase such as "writing a checkpoint"."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, doing, path) from error


def storage_error(error: OSError, doing: str, path: str | Path) -> StorageError:
    """Return the error to report in place of an `OSError`; the arguments are as in `storage`."""
    reason = error.strerror or str(error)
    remedy = _STORAGE_REMEDIES.get(error.errno or 0, "see the reason above")
    return StorageError(f"{doing}: {reason}: {error.filename or path}", f"{path} cannot be read or written", remedy)


def print_line(message: str) -> None:
    """Print a line. A full disk under standard output does not end a training: log.txt has the line as well."""
    with suppress(OSError):
        print(inert(message), flush=True)


def print_warning(message: str) -> None:
    print(f"warning: {inert(message)}", file=sys.stderr, flush=True)


def missing_extra(extra: str, what: str) -> LaunchError:
    """Return the error for packages that are installed only with an extra of wasteddp.

    Args:
        what: that needs them, as the subject of a sentence.
    """
    return LaunchError(
        f"{what} needs packages that are not installed",
        "this cannot be done",
        f"install them: pip install 'wasteddp[{extra}]'",
    )


def exit_with(error: WastedError) -> NoReturn:
    """Print the message and end the process with exit code 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_USER_ERROR)
