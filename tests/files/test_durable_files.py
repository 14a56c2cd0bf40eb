"""Files that survive kills: whole or not there, and rows that can be added to after a kill."""

from __future__ import annotations

import csv
import errno
import io
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from wasteddp import cli, files, lock_files
from wasteddp.commands import evaluate
from wasteddp.files import CsvWriter, appended_rows, read_rows, temporary_folder, written_whole


def test_rows_are_added_after_a_line_that_a_kill_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert list(read_rows(path)) == []
    for _ in range(2):
        with appended_rows(path) as append:
            append({"step": 1})
            append([1, "ö"])
    assert path.read_text().count("\n") == 4
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    with appended_rows(path) as append:
        append({"step": 3})
    assert list(read_rows(path)) == [{"step": 1}, [1, "ö"], {"step": 1}, [1, "ö"], {"step": 3}]


def test_rows_are_there_as_soon_as_the_block_ends_and_stay_if_it_fails(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), appended_rows(tmp_path / "rows.jsonl") as append:
        append(1)
        raise KeyboardInterrupt
    assert list(read_rows(tmp_path / "rows.jsonl")) == [1]


def test_damaged_lines_are_passed_over_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1}', b'{"step"; 2}', b'{"s\xf4ep": 3}', b"[4]", b'{"step": "5"}', b'{"step": 6}', b'{"st']
    lines.insert(3, b"[" * 100_000)
    path.write_bytes(b"\n".join(lines))
    damaged: list[str] = []
    assert list(read_rows(path, "step", damaged=damaged.append)) == [{"step": 1}, {"step": 6}]
    assert len(damaged) == 6


def test_a_temporary_folder_is_removed_also_after_a_kill_and_not_while_it_is_used(tmp_path: Path) -> None:
    said = list[str]()
    for name in (".work-a", ".work-b", ".other"):
        (tmp_path / name / "work").mkdir(parents=True)
        (tmp_path / name / "work" / "file").write_bytes(bytes(10**6))
    (tmp_path / ".work-a" / ".lock").touch()  # .work-b: killed before it had one
    (tmp_path / ".work-file").touch()
    (tmp_path / ".work-link").symlink_to(tmp_path / ".other")
    with temporary_folder(tmp_path, ".work-", said.append) as one:
        (one / "file").touch()
        with suppress(KeyboardInterrupt), temporary_folder(tmp_path, ".work-", said.append) as other:
            assert one.exists()
            assert one != other
            raise KeyboardInterrupt
        assert not other.parent.exists()
    assert said == [
        f"{tmp_path}: removed 2 temporary folder(s) with 2.0 MB, left by processes that were killed: .work-a, .work-b"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", ".work-file", ".work-link"]


def test_a_temporary_folder_is_locked_where_there_are_only_files_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", no_flock)
    for name, holder in ((".work-a", "1-0"), (".work-b", lock_files._process(os.getppid()))):  # ended, alive
        (tmp_path / name).mkdir()
        (tmp_path / name / f".lock.{socket.gethostname()}.{holder}.exclusive").touch()
    said = list[str]()
    with temporary_folder(tmp_path, ".work-", said.append) as one:
        assert one.exists()
    assert [line.rpartition(": ")[2] for line in said] == [".work-a"]
    assert [path.name for path in tmp_path.iterdir()] == [".work-b"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as file:
        file.write(b"old")
    with suppress(KeyboardInterrupt), written_whole(path, errors="surrogateescape") as file:
        file.write("new\udcff")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with written_whole(path, errors="surrogateescape") as file:
        file.write("new\udcff\r\n")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new\xff\r\n"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name", ["=cmd|'! A1.jpg", "+1.jpg", "-x.jpg", "@a.jpg", "a\rb.jpg", "\tx", 'a,"b.jpg', "ä\n.jpg"]
)
def test_no_cell_of_a_csv_is_a_formula_and_each_row_stays_one(name: str) -> None:
    text = io.StringIO()
    writer = CsvWriter(text)
    writer.write(["path", "class", "p_=x"])
    writer.write([name, name, 0.25])
    head, row = csv.reader(io.StringIO(text.getvalue(), newline=""))
    assert head == ["path", "class", "p_=x"]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row)
    assert row[0] in (name, f"./{name}")
    assert row[1] in (name, f"'{name}")
    assert float(row[2]) == 0.25


def test_a_new_folder_is_synced_in_all_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.make_folder(tmp_path / "a" / "b" / "c")
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
    synced.clear()
    files.make_folder(tmp_path / "a" / "b" / "c")  # a kill may have come before the sync
    assert synced == [tmp_path / "a" / "b"]


def test_a_command_names_an_error_of_a_file_that_nothing_else_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate, "_evaluate", no_space)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "runs/x"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "wasteddp evaluate: No space left on device" in said
    assert "do: free some space" in said
