"""Lines wait in memory while the disk is full, and none is lost, repeated or cut off."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from wasteddp.training.tracking.journal import Journal


def test_lines_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    room = [1000]
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(descriptor, data[: room[0]])  # fills the last free space with a part of a line, as a real disk
        room[0] -= taken
        return taken

    journal = Journal(tmp_path / "log.txt", said.append)
    monkeypatch.setattr(os, "write", write)
    journal.append("one\n")
    room[0] = 3
    journal.append("two is cut\n")
    journal.append("three\n")
    journal.sync()
    assert (tmp_path / "log.txt").read_text() == "one\n"
    assert said == [
        f"WARNING: {tmp_path / 'log.txt'} cannot be written: No space left on device; its lines wait in memory and "
        "training continues: free some space"
    ]
    room[0] = 1000
    journal.append("four\n")
    assert (tmp_path / "log.txt").read_text() == "one\ntwo is cut\nthree\nfour\n"
    assert said[1:] == [f"{tmp_path / 'log.txt'} can be written again; no line is missing"]
    room[0] = 0
    journal.append("five\n")
    journal.close()
    assert said[-1] == f"{tmp_path / 'log.txt'}: 1 lines could not be written and are lost"


def test_a_journal_goes_on_where_it_ended(tmp_path: Path) -> None:
    for line in ("one\n", "two\n"):
        journal = Journal(tmp_path / "log.txt", pytest.fail)
        journal.append(line)
        journal.close()
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"


def test_threads_append_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def slow(descriptor: int, data: bytes) -> int:
        written = real(descriptor, data)
        pause.wait(0.001)  # lets the other threads run between the write and the next call
        return written

    pause = threading.Event()
    monkeypatch.setattr(os, "write", slow)
    failures: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: failures.append(failure.exc_value))
    journal = Journal(tmp_path / "log.txt", pytest.fail)

    def speak(name: int) -> None:
        for number in range(20):
            journal.append(f"{name} {number}\n")

    threads = [threading.Thread(target=speak, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert not failures
    assert sorted(lines) == sorted(f"{name} {number}" for name in range(4) for number in range(20))


def test_a_line_after_the_end_goes_nowhere_else(tmp_path: Path) -> None:
    said: list[str] = []
    journal = Journal(tmp_path / "log.txt", said.append)
    journal.append("one\n")
    journal.close()
    other = os.open(tmp_path / "other.txt", os.O_RDWR | os.O_CREAT)  # gets the descriptor that was closed
    journal.append("late\n")
    os.close(other)
    assert (tmp_path / "other.txt").read_text() == ""
    assert "log.txt cannot be written: Bad file descriptor" in said[0]


def test_after_a_failed_sync_the_whole_file_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, said = tmp_path / "metrics.jsonl", os.fsync, list[str]()
    journal = Journal(path, said.append)
    journal.append("one\n")
    first = path.stat().st_ino

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    for _ in range(2):  # the file cannot be written again either
        journal.sync()
    assert len(said) == 1
    assert "cannot be written: Input/output error" in said[0]
    monkeypatch.setattr(os, "fsync", real)
    journal.append("two\n")
    journal.sync()
    assert path.stat().st_ino != first  # a second fsync of the first file would prove nothing
    journal.append("three\n")
    journal.close()
    assert path.read_text() == "one\ntwo\nthree\n"
