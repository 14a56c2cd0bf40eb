"""Files and locks that survive kills and power cuts, and text files from elsewhere. No torch.

`RunLock` lets one training at a time write into a run's folder. After a kill of only the launcher, or of one rank, the
other ranks may still be saving while the run is started again, and both would write the same checkpoints. The lock is
the kernel's (flock), which ends with the process; where the file system has none, it is a file (`lock_files`).
"""

from __future__ import annotations

import codecs
import csv
import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import resource
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from wasteddp.errors import CheckpointError, TextError, storage
from wasteddp.lock_files import LockFile

LOCK_WAIT_S = 60.0  # for a run that is saving after a signal
_POLL_S = 0.1
_MOST_NAMED = 3
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # the beginnings of a formula in a spreadsheet
_MARKS = {  # byte order marks; the longer first
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP)  # CIFS and some FUSE file systems


def open_descriptor(path: str | Path, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
    """Open a regular file and return its descriptor. A pipe or a device, which may never end, is not opened.

    Raises:
        OSError: there is no such file, it cannot be opened, or it is something else.
    """
    try:
        # Without O_NONBLOCK, a pipe would wait for its other end. For a regular file it changes nothing.
        descriptor = os.open(path, flags | os.O_NONBLOCK, mode)
    except ValueError as error:
        raise OSError(errno.EINVAL, "its name has a NUL byte", str(path)) from error
    found = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(found):
        os.close(descriptor)
        if stat.S_ISDIR(found):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return descriptor


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: as in `open_descriptor`.
    """
    return os.fdopen(open_descriptor(path), "rb")


def read_regular(path: str | Path) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: it cannot be read, or as in `open_descriptor`.
    """
    with open_regular(path) as file:
        return file.read()


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Return `length` bytes from `offset` on, or fewer at the end of the file, without moving the file's position.

    One call of os.pread may return fewer, in particular on a network file system.
    """
    data = os.pread(descriptor, length, offset)
    while 0 < len(data) < length and (part := os.pread(descriptor, length - len(data), offset + len(data))):
        data += part
    return data


def most_files(part: float, most: int) -> int:
    """Return this part of the number of files that the process may open, at least 1 and at most `most`."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if limit == resource.RLIM_INFINITY else max(1, min(most, int(limit * part)))


def write_atomically(path: Path, content: bytes, *, shared: bool = False) -> None:
    """Write a file so that a reader, or the next start after a kill, sees either all of it or the previous file.

    Args:
        shared: other processes may write the same file at the same time. The last one wins.
    """
    with written_whole(path, shared=shared) as file, storage("writing", path):
        file.write(content)


@contextmanager
def written_whole(path: Path, *, errors: str | None = None, shared: bool = False) -> Iterator[IO[Any]]:
    """Open a file that is written piece by piece, and gets its name when the block ends without an error.

    An `OSError` of the block itself is raised unchanged, since it may not come from this file.

    Args:
        errors: opens a text file in UTF-8, with this handling of characters that UTF-8 does not have.
        shared: other processes may write the same file at the same time, so that the temporary file has a name of its
            own. One that a kill leaves is not replaced by the next start: only for folders that are removed at the end.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp" if shared else f"{path.name}.tmp")
    with storage("writing", path):
        _refuse_other_kinds(path)  # now: at the end, what was written would be lost
        temporary.unlink(missing_ok=True)  # left by a kill, or a link that another user has put there
        file: IO[Any] = (
            temporary.open("x", encoding="utf-8", errors=errors, newline="") if errors else temporary.open("xb")
        )
    try:
        yield file
        with storage("writing", path):
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # closing writes what is left, which fails again on a full disk
            file.close()
        temporary.unlink(missing_ok=True)


def _refuse_other_kinds(path: Path) -> None:
    """Refuse a folder, which cannot be replaced, and a pipe or a device such as /dev/null, which must not be.

    Raises:
        OSError: it is one of these, also through a link.
    """
    try:
        found = path.stat().st_mode
    except OSError:  # there is none yet, or a link that leads nowhere or to itself, which is replaced
        return
    if stat.S_ISDIR(found):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found) or (path.is_symlink() and str(path.readlink()).startswith("/proc/")):  # /dev/stdout
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


@contextmanager
def appended_rows(path: Path) -> Iterator[Callable[[Any], None]]:
    """Append rows to a file of JSON lines. They are on the disk when the block ends. A line cut by a kill is ended."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    with storage("writing", path), os.fdopen(open_descriptor(path, flags), "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")

        def append(row: Any) -> None:
            file.write(json.dumps(row).encode() + b"\n")

        yield append
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path, *numbers: str, damaged: Callable[[str], object] = lambda line: None) -> Iterator[Any]:
    """Yield the rows of a file of JSON lines; a missing file has no rows.

    Args:
        numbers: keys that each row must have, with a number as value.
        damaged: receives each line that is not a row. A line that a kill cut, or that is being written, has no newline.
    """
    if not path.exists():
        return
    with storage("reading", path), io.TextIOWrapper(open_regular(path), "utf-8", "replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                if not all(isinstance(row[name], (int, float)) for name in numbers):
                    raise ValueError(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged(line)
            else:
                yield row


class CsvWriter:
    """Writes rows of CSV in which no text is a formula to a spreadsheet, and no character ends a row early.

    A text that begins with =, +, -, @, a tab or a carriage return gets a prefix: `./` in the first column, which holds
    a path and keeps its meaning, and an apostrophe in the others.
    """

    def __init__(self, file: IO[str]) -> None:
        self._plain = csv.writer(file, lineterminator="\n")
        self._quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)

    def write(self, row: Iterable[Any]) -> None:
        cells = [
            ("'" if number else "./") + cell if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
            for number, cell in enumerate(row)
        ]
        # Python before 3.13 does not quote a carriage return by itself
        has_return = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (self._quoted if has_return else self._plain).writerow(cells)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with storage("reading", path), open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Make the content of a file, which another library has written, survive a power cut."""
    with open_regular(path) as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> bool:
    """Make renames inside `folder` survive a power cut. Return False where the file system has no such call."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, if they are missing, and make their names survive a power cut."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in (folder, *missing):  # the folder's own name as well if it exists: a kill may have come before the sync
        with suppress(PermissionError):  # a parent that this user cannot list
            sync_folder(one.parent)


@contextmanager
def temporary_folder(parent: Path, prefix: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Give a new folder below `parent`, which is removed at the end. Before that, remove those that kills have left.

    A folder is in use while its process holds the lock on a file in it. Folders of other users stay.

    Args:
        prefix: beginning of the names of these folders, and of no others.
        say: receives a line that counts and names what was removed.

    Raises:
        StorageError: `parent` cannot be written.
    """
    with storage("making a temporary folder", parent):
        _remove_left(parent, prefix, say)
        while (release := _lock_in(folder := Path(tempfile.mkdtemp(prefix=prefix, dir=parent)))) is None:
            pass  # another process took it for one that a kill has left
    try:
        with storage("making a temporary folder", folder):
            work = folder / "work"
            work.mkdir()
        yield work
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release()


def _lock_in(folder: Path) -> Callable[[], None] | None:
    """Take the lock of a temporary folder and return what releases it.

    Return None if another process has it, or has removed the folder.
    """
    path = folder / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    lock_file = LockFile(path)

    def release() -> None:
        lock_file.release()
        os.close(descriptor)

    if try_lock_or_announce(descriptor, lock_file, str(folder), lambda line: None) and path.exists():
        return release
    release()
    return None


def _remove_left(parent: Path, prefix: str, say: Callable[[str], None]) -> None:
    removed, num_bytes = list[str](), 0
    for folder in sorted(parent.glob(f"{glob.escape(prefix)}*")):
        with suppress(OSError), ExitStack() as stack:  # another process may have removed it
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or (release := _lock_in(folder)) is None:
                continue
            stack.callback(release)
            size_bytes = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
            shutil.rmtree(folder)
            num_bytes += size_bytes
            removed.append(folder.name)
    if removed:
        say(
            f"{parent}: removed {len(removed):,} temporary folder(s) with {num_bytes / 1e6:,.1f} MB, left by processes "
            f"that were killed: {', '.join(removed[:_MOST_NAMED])}{', ...' if len(removed) > _MOST_NAMED else ''}"
        )


def expand_home(path: str) -> str:
    """Replace a ~ at the start by the home folder. The rest stays as it is written."""
    return os.path.expanduser(path)  # noqa: PTH111, Path.expanduser changes more, and raises for unknown users


def read_text(path: str | Path, doing: str) -> str:
    """Read a text file that somebody wrote: in UTF-8, or in the encoding of its byte order mark.

    Args:
        doing: for the message, such as "reading the settings".

    Raises:
        TextError: it is in another encoding, or not text. StorageError: it cannot be read.
    """
    with storage(doing, path):
        content = read_regular(path)
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        problem, at = f"byte 0x{content[error.start : error.start + 1].hex()}", content.count(b"\n", 0, error.start)
    else:
        if 4 * text.count("\0") < len(text) or not text:  # more: UTF-16 without its mark
            return text
        problem, at = "a NUL character", text.count("\n", 0, text.index("\0"))
    raise TextError(
        f"{doing}: {path} is not text in {encoding.removesuffix('-sig').upper()}: {problem} in line {at + 1}",
        "its names and values would be read wrongly",
        f"save it as UTF-8; if it is from Windows: iconv -f WINDOWS-1252 -t UTF-8 {path} > NEW{Path(path).suffix}",
    )


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Take the kernel's lock on an open file without waiting. Return False if another process has it.

    The lock ends when the file is closed or the process ends.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def try_lock_or_announce(
    descriptor: int, lock_file: LockFile, what: str, say: Callable[[str], None], *, shared: bool = False
) -> bool:
    """`try_lock`, but on a file system without locks take `lock_file`, and report that."""
    try:
        return try_lock(descriptor, shared=shared)
    except OSError as error:
        is_taken = lock_file.take(shared=shared)
        if is_taken:
            say(f"{what} cannot be locked ({error.strerror}): it is marked as in use by a file instead")
        return is_taken


def try_lock_or_warn(descriptor: int, what: str, say: Callable[[str], None], *, shared: bool = False) -> bool:
    """`try_lock`, but on a file system without locks report that and return True."""
    try:
        return try_lock(descriptor, shared=shared)
    except OSError as error:
        say(f"{what} cannot be locked ({error.strerror}): make sure that nothing else writes there at the same time")
        return True


class RunLock:
    """The lock on a run's checkpoints, held from the constructor to `release` or the end of the process.

    Args:
        folder: of the checkpoints; created if missing.
        say: receives a line that names the process it waits for.
        wait_s: time limit for another training to end.

    Raises:
        CheckpointError: another training still writes there.
        StorageError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], *, wait_s: float = LOCK_WAIT_S) -> None:
        with storage("making the checkpoints' folder", folder):
            make_folder(folder)
            self._lock_file = LockFile(folder / ".lock")
            self._file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            self._lock(folder, say, wait_s)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            self._lock_file.release()
            os.close(file)

    def _lock(self, folder: Path, say: Callable[[str], None], wait_s: float) -> None:
        until, is_reported = time.monotonic() + wait_s, False
        while not try_lock_or_announce(self._file, self._lock_file, str(folder), say):
            holder = os.pread(self._file, 200, 0).decode(errors="replace").strip() or "another process"
            if time.monotonic() >= until:
                raise CheckpointError(
                    f"{folder} is being written by {holder}, and was for the {wait_s:g} s that this start waited",
                    "two trainings would overwrite each other's checkpoints",
                    "wait for it to end, end it, or set run.out to a new folder",
                )
            if not is_reported:
                say(f"waiting for {holder}, which still writes into {folder}")
                is_reported = True
            time.sleep(_POLL_S)
        with suppress(OSError):  # on a full disk, others do not learn who has the lock
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


@contextmanager
def hold_run(run: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a run, if it has checkpoints, so that no training replaces its model.

    Raises:
        CheckpointError: a training has the lock.
    """
    folder = run / "checkpoints"
    lock = RunLock(folder, say, wait_s=0) if folder.is_dir() else None
    try:
        yield
    finally:
        if lock:
            lock.release()
