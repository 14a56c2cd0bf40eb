"""Text files from elsewhere: encodings, and what becomes of ~."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wasteddp import environment
from wasteddp.cli import main, parser
from wasteddp.errors import TextError, WastedError
from wasteddp.files import expand_home, read_text, sync_folder, write_atomically


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_utf_8_and_the_encodings_of_a_byte_order_mark_are_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("grün\n瓶\n", encoding=encoding)
    assert read_text(tmp_path / "a.txt", "reading") == "grün\n瓶\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\ngrün\n".encode("latin-1"), "reading: .*a.txt is not text in UTF-8: byte 0xfc in line 2\n.*\n.*iconv"),
        ("a\nb\n".encode("utf-16-le"), "a NUL character in line 1"),
        (b"\xff\xfea\n\0", "is not text in UTF-16: byte 0x00 in line 2"),
        (b"PK\x03\x04\xff", "is not text in UTF-8: byte 0xff in line 1"),
    ],
)
def test_other_encodings_are_refused_with_file_and_line(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(TextError, match=expected):
        read_text(tmp_path / "a.txt", "reading")


@pytest.mark.parametrize(
    "command",
    [
        "settings FILE",
        "doctor --config FILE",
        "shard images --out set --split-files train=FILE",
        "shard images --out set --bins FILE",
        "shard recipe.yaml",
        "shard labels.csv --out set",
        "index . --classes-from FILE",
        "dashboard FILE",
    ],
)
def test_each_command_names_the_file_that_is_not_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("FILE", "recipe.yaml", "labels.csv"):
        Path(name).write_bytes(b"gr\xfcn: x\n")
    for name in ("glass", "metal"):
        Path("images", name).mkdir(parents=True)
        Path("images", name, "a.jpg").touch()
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    assert "is not text in UTF-8: byte 0xfc in line 1" in capsys.readouterr().err


def test_home_is_expanded_and_the_rest_stays_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("~/a//./b") == "/home/me/a//./b"
    assert [expand_home(text) for text in ("a/~/b", "./a", "~no-such-user/a")] == ["a/~/b", "./a", "~no-such-user/a"]


@pytest.mark.parametrize("command", ["evaluate", "predict", "shard", "index", "report", "sync", "plan"])
def test_home_is_expanded_in_arguments(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    more = {"predict": ["~/set"], "index": ["--out=~/out"], "report": ["--out=~/out"], "shard": ["--out=~/out"]}
    arguments = vars(parser().parse_args([command, "~/run", *more.get(command, [])]))
    assert "~" not in str(arguments)
    assert "/home/me/run" in str(arguments)


def test_programs_start_with_an_ascii_terminal_and_empty_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("WORLD_SIZE", "")
    environment.prepare()
    print("grün", "瓶", "\udcfc", flush=True)
    assert terminal.buffer.getvalue() == rb"gr\xfcn \u74f6 \udcfc" + b"\n"  # type: ignore[attr-defined]
    assert "WORLD_SIZE" not in os.environ


def test_a_url_as_source_of_images_is_refused_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shard", "https://example.org/waste.zip", "--out", "set"])
    assert "https://example.org/waste.zip is a URL, and images are read from this machine" in capsys.readouterr().err


def failing_for_folders(number: int) -> Callable[[int], None]:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    return fsync


def test_a_file_system_that_cannot_sync_folders_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing_for_folders(errno.EINVAL))
    write_atomically(tmp_path / "a", b"x")
    assert not sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing_for_folders(errno.EIO))
    with pytest.raises(WastedError, match="Input/output error"):
        write_atomically(tmp_path / "a", b"x")
