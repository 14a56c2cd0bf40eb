"""Names of files, folders and classes are data: not commands of a terminal, and not formulas of a spreadsheet."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path

import pytest
from pictures import jpeg
from small_run import write_run

from wasteddp.cli import main

ESCAPE = "\x1b[31m"


def test_no_command_prints_an_escape_of_a_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("=1+1", f"metal{ESCAPE}", "paper\x9b2J")
    for number, name in enumerate(names):
        for image in range(6):
            path = tmp_path / "images" / name / f"{image}\u202e{ESCAPE}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(10 * number + image, size=(24, 20)))
    (tmp_path / "images" / names[1] / f".hidden{ESCAPE}").touch()
    (tmp_path / "images" / names[1] / f"no{ESCAPE}image.txt").touch()
    (tmp_path / "images" / names[1] / f"cut{ESCAPE}.jpg").write_bytes(jpeg(1)[:200])
    (tmp_path / "images" / names[0] / "twice.jpg").write_bytes(jpeg(0, size=(24, 20)))
    (tmp_path / "images" / f"none{ESCAPE}").mkdir()
    shards = str(tmp_path / "set")

    def run(*words: str) -> str:
        with contextlib.suppress(SystemExit):
            main(list(words))
        out = "".join(capfd.readouterr())
        assert not {"\x1b", "\x9b", "\u202e"} & set(out), out
        return out

    assert "hold no image: 'none\\x1b[31m'" in run("shard", str(tmp_path / "images"), "--out", shards)
    (tmp_path / "images" / f"none{ESCAPE}").rmdir()
    assert "metal\\x1b[31m" in run("shard", str(tmp_path / "images"), "--out", shards)
    assert "is whole" in run("verify", shards)
    assert "steps" in run("plan", shards, "--set", "train.batch_size=3")
    assert "byte for byte" in run("compare", shards, shards)
    tars = tmp_path / "tars"
    tars.mkdir()
    for path in Path(shards).glob("*.tar"):
        (tars / path.name).write_bytes(path.read_bytes())
    assert "metal\\x1b[31m" in run("index", str(tars))
    model = str(write_run(tmp_path / "of"))
    monkeypatch.chdir(tmp_path / "images")
    assert "metal\\x1b[31m/cut" in run("predict", model, *names, "--csv", str(tmp_path / "out.csv"))
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1][0].startswith("./=1+1/")
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
