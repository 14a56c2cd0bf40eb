"""Lines wait in memory while the disk is full, and none is lost, doubled or cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from wasteddp.training.journal import Journal


def test_lines_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    room = [1000]
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(descriptor, data[: room[0]])  # the last of the room takes a part of a line, as a real disk does
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
        f"WARNING: {tmp_path / 'log.txt'} cannot be written: No space left on device; its lines wait in memory, "
        "training goes on: free some space"
    ]
    room[0] = 1000
    journal.append("four\n")
    assert (tmp_path / "log.txt").read_text() == "one\ntwo is cut\nthree\nfour\n"
    assert said[1:] == [f"{tmp_path / 'log.txt'} can be written again; nothing of it is missing"]
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
