"""A pipe, a device that never ends, or a folder in the place of a file is refused, wherever a file is read."""

from __future__ import annotations

import ast
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from small_run import write_run
from trainings import ROOT, config_of

from wasteddp.cli import main
from wasteddp.data import file_loader
from wasteddp.data.decoding.crop import EvaluationView
from wasteddp.data.decoding.workers import Workers
from wasteddp.data.file_loader import Unreadable, file_views
from wasteddp.errors import WastedError
from wasteddp.files import appended_rows, read_at, write_atomically, written_whole
from wasteddp.model import pretrained
from wasteddp.training.tracking.journal import Journal

_HANGS_AFTER_S = 60
PACKAGE = ROOT / "wasteddp"
# They read files of the package or of the kernel.
_EXEMPT = {
    "environment.py", "parallel.py", "lock_files.py", "data/decoding/formats.py", "report/page.py",
    "serve/app.py", "tools/machine_checks.py", "tools/verify_resume.py",
    "training/distributed/startup.py",
}  # fmt: skip


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """Fail a test that waits for a pipe, or reads zeros without end."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(_HANGS_AFTER_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images, a set, a run with a model and an evaluation, and text files."""
    folder = tmp_path_factory.mktemp("intact")
    run = write_run(folder)
    assert main(["evaluate", str(run), "--shards", str(folder / "shards"), "--split", "test"]) == 0
    (run / "metrics.jsonl").write_text('{"step": 1, "time_s": 1.0}\n')
    config_of(folder, folder / "shards")
    classes = sorted(path.name for path in (folder / "images" / "test").iterdir())
    photos = {name: sorted((folder / "images" / "test" / name).iterdir()) for name in classes}
    (folder / "bins.yaml").write_text("".join(f"{name}: bin\n" for name in classes))
    (folder / "table.csv").write_text(
        "path,label\n" + "".join(f"{path},{name}\n" for name, paths in photos.items() for path in paths)
    )
    (folder / "list.txt").write_text("".join(f"{name}/{path.name}\n" for name in classes for path in photos[name]))
    (folder / "photo.jpg").write_bytes(photos[classes[0]][0].read_bytes())
    return folder


def replace(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


CASES = {
    "config.yaml": "settings {config.yaml}",
    "bins.yaml": "shard {images/test} --out {out} --bins {bins.yaml}",
    "table.csv": "shard {table.csv} --out {out}",
    "list.txt": "shard {images/test} --out {out} --split-files train={list.txt}",
    "recipe.yaml": "shard {recipe.yaml}",
    "images.zip": "shard {images.zip} --out {out}",
    "images.tar": "shard {images.tar} --out {out}",
    "names.txt": "index {shards} --classes-from {names.txt}",
    "dashboard.yaml": "dashboard {dashboard.yaml}",
    "shards/manifest.json": "verify {shards}",
    "shards/*.idx": "verify {shards}",
    "shards/*.tar": "verify {shards}",
    "run/model/model.json": "predict {run} {photo.jpg}",
    "run/model/model-*.safetensors": "predict {run} {photo.jpg}",
    "run/metrics.jsonl": "verify {run}",
}


@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder"])
@pytest.mark.parametrize("file", CASES)
def test_it_is_refused_with_a_message(
    intact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str, kind: str
) -> None:
    copy = Path(shutil.copytree(intact, tmp_path / "copy"))
    path = next(copy.glob(file), copy / file)
    path.touch()
    replace(path, kind)
    words = CASES[file].replace("{", f"{copy}/").replace("}", "").split()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    found = capfd.readouterr().err
    assert found.startswith("error: ")
    assert path.name in found or kind == "folder", found


@pytest.mark.parametrize("kind", ["pipe", "zeros"])
def test_a_report_notes_it(intact: Path, tmp_path: Path, kind: str) -> None:
    copy = Path(shutil.copytree(intact / "run", tmp_path / "run"))
    replace(next(copy.glob("evaluations/*/metrics.json")), kind)
    assert main(["report", str(copy)]) == 0
    assert "it is a pipe or a device, not a file" in (copy / "report.html").read_text()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder"])
def test_initial_weights(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).touch()
    replace(tmp_path / name, kind)
    with pytest.raises(WastedError, match=name):
        pretrained._local(tmp_path / name)


def test_an_endless_device_is_not_read_as_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_loader, "_MAX_STREAM_BYTES", 1 << 20)
    ((_, view),) = file_views(["/dev/zero"], EvaluationView(16), side_px=16, workers=Workers(1, None))
    assert isinstance(view, Unreadable)
    assert "too_large" in view.reason


def test_what_is_appended_to_or_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WastedError, match="not a file"), appended_rows(tmp_path / "pipe"):
        pass
    with pytest.raises(OSError, match=r"not a file|No such device"):
        Journal(tmp_path / "pipe", print)
    (tmp_path / "stdout").symlink_to("/proc/self/fd/0")
    for name, message in (("pipe", "not a file"), ("stdout", "not a file"), ("folder", "Is a directory")):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(WastedError, match=message), written_whole(tmp_path / name):
            pytest.fail("it was written, and the result of hours would be lost at the end")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "foreign").write_bytes(b"of somebody else")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "foreign")  # planted where others may write
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "foreign").read_bytes() == b"of somebody else"
    assert not (tmp_path / "file").is_symlink()


def test_no_module_reads_a_file_in_another_way() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if str(path.relative_to(PACKAGE)) not in _EXEMPT
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("read_bytes", "read_text")
    ]
    assert not found, f"use read_regular or read_text of wasteddp.files: {found}"


def test_a_read_that_returns_a_part_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, offset: whole(file, min(length, 7), offset))
    with (tmp_path / "x").open("rb") as file:
        assert read_at(file.fileno(), 50, 20) == bytes(range(20, 70))
        assert read_at(file.fileno(), 50, 90) == bytes(range(90, 100))
        assert read_at(file.fileno(), 50, 100) == b""


def test_all_reads_at_a_place_go_on_after_a_part() -> None:
    callers = {
        path.name
        for path in (ROOT / "wasteddp").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("pread", "preadv")
        if isinstance(node.value, ast.Name) and node.value.id == "os"
    }
    assert callers == {"files.py", "worker.py"}  # worker.py reads whole files of an unknown size in a loop
