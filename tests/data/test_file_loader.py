"""Views of files by processes equal those by threads, bit for bit, for all files and even if processes die."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from killing_view import KillingView
from PIL import Image
from small_run import write_image

from wasteddp.data import file_loader as module
from wasteddp.data.decoding.crop import EvaluationView, View
from wasteddp.data.decoding.workers import DecodeServer, Workers
from wasteddp.data.file_loader import FileView, Unreadable, file_views
from wasteddp.errors import WorkerError

pytestmark = pytest.mark.processes
VIEW = EvaluationView(resize_px=28)
THREADS = Workers(2)
HERE = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def server() -> Iterator[DecodeServer]:
    """Start one server for all tests, since importing torch takes seconds. It can import modules of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        with DecodeServer() as found:
            yield found


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Return files of all kinds, good and bad; the good files all differ."""
    folder = tmp_path / "photos"
    for seed, suffix in enumerate((".jpg", ".png", ".webp", ".bmp", ".gif", ".tiff")):
        write_image(folder / f"plain{suffix}", seed, (48 + seed, 40))
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        with Image.open(write_image(folder / "to-turn.png", 10 + turn)) as image:
            image.save(folder / f"turned-{turn}.jpg", exif=exif)
    with Image.open(folder / "plain.png") as image:
        image.convert("CMYK").save(folder / "cmyk.jpg")
        image.convert("L").save(folder / "grey.jpg")
        image.resize((700, 900)).save(folder / "large.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes((folder / "plain.jpg").read_bytes()[:-200])
    (folder / "text.png").write_text("hello")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    found = [str(path) for path in sorted(folder.iterdir())] + [str(folder)]
    if sys.platform == "linux":  # a file of unknown size, and one that cannot be read
        found += ["/proc/self/status", "/proc/self/mem"]
    return found


def views(paths: list[str], workers: Workers, view: View = VIEW, notes: list[str] | None = None) -> list[FileView]:
    return list(file_views(paths, view, side_px=24, workers=workers, warn=(notes if notes is not None else []).append))


def require_equal(ours: list[FileView], others: list[FileView]) -> None:
    assert [path for path, _ in ours] == [path for path, _ in others]
    for (path, one), (_, other) in zip(ours, others, strict=True):
        if isinstance(one, Unreadable) or isinstance(other, Unreadable):
            assert one == other, path
        else:
            assert np.array_equal(one, other), path


@pytest.mark.parametrize("number", [1, 2, 5])
def test_processes_give_what_threads_give(photos: list[str], server: DecodeServer, number: int) -> None:
    paths = photos * 3
    expected = views(paths, THREADS)
    reasons = {Path(path).name: view.reason for path, view in expected if isinstance(view, Unreadable)}
    assert reasons["empty.jpg"] == "empty: the file has 0 bytes"
    assert reasons["cut.jpg"].startswith("truncated")
    assert reasons["gone.jpg"] == "unreadable: No such file or directory"
    assert reasons["photos"] == "unreadable: this folder cannot be listed"
    assert set(reasons) - {"status", "mem"} == {"empty.jpg", "cut.jpg", "gone.jpg", "photos", "text.png"}
    notes: list[str] = []
    require_equal(views(paths, Workers(number, server), notes=notes), expected)
    assert not notes


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 41])
def test_any_number_of_files(photos: list[str], server: DecodeServer, count: int) -> None:
    paths = list(itertools.islice(itertools.cycle(photos), count))
    require_equal(views(paths, Workers(2, server)), views(paths, THREADS))


def test_a_pipe_and_a_name_that_only_this_process_knows(tmp_path: Path, server: DecodeServer) -> None:
    photo = write_image(tmp_path / "a.jpg", 1)
    expected = views([str(photo)], THREADS)[0][1]
    os.mkfifo(tmp_path / "pipe")
    with photo.open("rb") as file:
        writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(photo.read_bytes()))
        writer.start()
        found = views([str(tmp_path / "pipe"), f"/dev/fd/{file.fileno()}", str(photo)], Workers(2, server))
        writer.join()
    assert all(np.array_equal(view, expected) for _, view in found)
    assert len(found) == 3


def test_fewer_open_files_than_there_are_files_on_their_way(
    photos: list[str], server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_most_files", lambda: 10)
    require_equal(views(photos * 4, Workers(5, server)), views(photos * 4, THREADS))
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        assert module._most_files() == 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_endless_list_is_answered_as_it_comes_and_all_is_closed(photos: list[str], server: DecodeServer) -> None:
    asked = 0

    def endless() -> Iterator[str]:
        nonlocal asked
        for asked, path in enumerate(itertools.cycle(photos)):  # noqa: B007
            yield path

    before = len(list(Path("/dev/fd").iterdir()))
    with closing(file_views(endless(), VIEW, side_px=24, workers=Workers(2, server))) as found:
        for _ in range(100):
            next(found)
    assert 100 <= asked < 200
    assert len(list(Path("/dev/fd").iterdir())) == before


# --- death ----------------------------------------------------------------------------------------------------------


def killing(paths: list[Path], once: Path | None) -> KillingView:
    return KillingView(VIEW, frozenset(sha256(path.read_bytes()).hexdigest() for path in paths), once)  # type: ignore[arg-type]


def test_a_process_that_is_killed_changes_nothing(photos: list[str], server: DecodeServer, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    deadly = [Path(path) for path in photos if Path(path).name in ("plain.jpg", "turned-6.jpg", "grey.jpg")]
    notes: list[str] = []
    require_equal(
        views(photos * 3, Workers(2, server), killing(deadly, tmp_path / "once"), notes), views(photos * 3, THREADS)
    )
    assert len(notes) == 3
    assert "was killed by SIGKILL (out of memory?)" in notes[0]


def test_a_file_that_kills_two_processes_is_one_that_cannot_be_read(
    photos: list[str], server: DecodeServer, tmp_path: Path
) -> None:
    deadly = next(path for path in photos if path.endswith("plain.png"))
    paths = [path for path in photos if path != deadly]
    copy = str(shutil.copy(deadly, tmp_path / "copy.png"))
    found = views([*photos, copy], Workers(2, server), killing([Path(deadly)], None))
    words = "unreadable: it killed 2 decoding processes (the last was killed by SIGKILL (out of memory?))"
    assert {path: view for path, view in found if path in (deadly, copy)} == {
        deadly: Unreadable(words),
        copy: Unreadable(words),
    }
    require_equal([one for one in found if one[0] in paths], views(paths, THREADS))


def test_processes_that_die_at_once_end_it(photos: list[str], server: DecodeServer) -> None:
    good = [path for path in photos if Path(path).name.startswith("turned")]
    view = killing([Path(path) for path in good], None)
    with pytest.raises(WorkerError, match="10 times in a row"):
        views(good * 3, Workers(1, server), view)


def test_a_server_that_is_killed_is_started_again(photos: list[str]) -> None:
    notes: list[str] = []
    with DecodeServer() as own:
        found = []
        for view in file_views(photos * 4, VIEW, side_px=24, workers=Workers(2, own), warn=notes.append):
            found.append(view)
            if len(found) == 20:
                own._process.kill()
                own._process.wait()
                time.sleep(0.2)
    require_equal(found, views(photos * 4, THREADS))
    assert "was killed with the server of the decoding processes" in notes[0]


def test_a_fault_of_the_program_is_raised_with_its_traceback(photos: list[str], server: DecodeServer) -> None:
    with pytest.raises(RuntimeError, match=r"in the decoding process [01]:(.|\n)*TypeError"):
        views(photos, Workers(2, server), EvaluationView(resize_px="many"))  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
