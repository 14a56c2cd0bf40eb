"""`predict --watch`: each photo has one row, over restarts, kills, renames, growing and damaged files."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from narrow import __file__ as NARROW
from small_run import BINS, CARD, CLASSES, random_weights, write_image

from wasteddp.cli import main
from wasteddp.decisions.decide import BinRules, Policy
from wasteddp.decisions.thresholds import ErrorThreshold
from wasteddp.errors import SourceError
from wasteddp.files import open_regular
from wasteddp.inference.answered_files import AnsweredCsv, AnsweredFile, AnsweredJsonLines
from wasteddp.inference.bundle import save_bundle
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.prediction_files import Terminal
from wasteddp.inference.watch import CHANGES, TRIES, Stop, Watch

KINDS: dict[str, type[AnsweredFile]] = {".csv": AnsweredCsv, ".jsonl": AnsweredJsonLines}
POLICY = Policy(BinRules.of_map(BINS, CLASSES), ErrorThreshold(0.6, 0.05, 0.95, 0.04, 50, 40, 0))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(folder, CARD, random_weights())
    return folder


@pytest.fixture(scope="module")
def classifier(bundle: Path) -> Classifier:
    return Classifier.load(bundle, device="cpu", batch_size=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for seed in range(3):
        write_image(folder / f"{seed}.jpg", seed)
    return folder


@pytest.fixture
def stop() -> Iterator[Stop]:
    with closing(Stop()) as stop:
        yield stop


Start = Callable[..., Watch]


@pytest.fixture
def start(photos: Path, classifier: Classifier) -> Iterator[Start]:
    """Starts a watch; the one before is ended, as by a kill."""
    with ExitStack() as stack:

        def started(*paths: Path, policy: Policy | None = None, folder: Path = photos) -> Watch:
            stack.close()
            kinds = [KINDS[path.suffix] for path in paths]
            files = [kind(path, CARD, decides=policy is not None) for kind, path in zip(kinds, paths, strict=True)]
            for file in files:
                stack.callback(file.close)
            return Watch(folder, classifier, files, Terminal(CARD, top=1, policy=policy), policy=policy)

        yield started


def rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def answered(path: Path) -> list[str]:
    return [Path(row["path"]).name for row in rows(path)]


def poll(watch: Watch, stop: Stop, times: int = 2) -> None:
    for _ in range(times):
        watch.poll(stop)


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_rows_are_those_of_predict(
    name: str, bundle: Path, photos: Path, tmp_path: Path, start: Start, stop: Stop
) -> None:
    (photos / "deep").mkdir()
    (photos / "0.jpg").rename(photos / "deep" / 'a "quoted"\nname\r.jpg')
    (photos / "notes.txt").write_text("no photo")
    (photos / ".1.jpg.part").write_bytes(b"of rsync")
    watch = start(tmp_path / name)
    watch.poll(stop)
    assert rows(tmp_path / name) == []  # no photo is known to be whole
    poll(watch, stop)
    found = rows(tmp_path / name)
    main(["predict", str(bundle), str(photos), "--csv", str(tmp_path / "p.csv"), "--json", str(tmp_path / "p.json")])
    wanted = (
        rows(tmp_path / "p.csv") if name == "out.csv" else json.loads((tmp_path / "p.json").read_text())["predictions"]
    )
    assert len(found) == len(wanted) == 3
    for row, expected in zip(found, wanted, strict=True):
        assert {key: row[key] for key in expected} == expected
        status = Path(row["path"]).stat()
        assert (int(row["bytes"]), int(row["modified_ns"])) == (status.st_size, status.st_mtime_ns)
    poll(start(tmp_path / name), stop)
    assert rows(tmp_path / name) == found


def test_a_policy_decides(photos: Path, tmp_path: Path, start: Start, stop: Stop) -> None:
    poll(start(tmp_path / "out.csv", tmp_path / "out.jsonl", policy=POLICY), stop)
    one, other = rows(tmp_path / "out.csv"), rows(tmp_path / "out.jsonl")
    assert [row["decision"] for row in one] == [row["decision"] for row in other]
    assert {row["decision"] for row in one} <= {*BINS.values(), "person"}
    with pytest.raises(SourceError, match="does not begin with"):  # without a policy it has other columns
        start(tmp_path / "out.csv")


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_a_kill_at_any_byte_loses_no_row_and_doubles_none(
    name: str, photos: Path, tmp_path: Path, start: Start, stop: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "1.jpg").rename(photos / 'a "quoted"\nname.jpg')
    path = tmp_path / name
    poll(start(path), stop)
    whole, before = path.read_bytes(), rows(path)
    draws = np.random.default_rng(0).integers(1, len(whole), 12)
    ends = [number for number, byte in enumerate(whole, 1) if byte == ord("\n")]
    for size in {0, 1, *draws.tolist(), *ends, *(end - 1 for end in ends)}:
        path.write_bytes(whole[:size])
        capsys.readouterr()
        watch = start(path)
        assert ("cut by a kill" in capsys.readouterr().err) == (
            size not in (0, *ends) or whole[:size].count(b'"') % 2 == 1
        )
        poll(watch, stop)
        assert sorted(rows(path), key=lambda row: row["path"]) == sorted(before, key=lambda row: row["path"]), size


def test_photos_that_come_later_are_answered_and_a_stop_ends_after_a_batch(
    photos: Path, tmp_path: Path, start: Start, stop: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = start(tmp_path / "out.csv")
    poll(watch, stop)
    for seed in range(3, 8):
        write_image(photos / f"{seed}.jpg", seed)
    watch.poll(stop)
    real, count = watch._answer, []

    def answer(batch: Any) -> None:
        real(batch)
        count.append(len(batch))
        stop.set()

    watch._answer = answer  # type: ignore[method-assign]
    watch.poll(stop)
    watch.finish()
    assert count == [2]
    printed = capsys.readouterr().out
    assert "5 classified, 0 unreadable" in printed
    assert "3 photo(s) wait, and are answered after the next start" in printed
    with closing(Stop()) as stop:
        poll(start(tmp_path / "out.csv"), stop)
    assert sorted(answered(tmp_path / "out.csv")) == [f"{seed}.jpg" for seed in range(8)]


def test_a_file_that_grows_is_read_when_it_is_whole(photos: Path, tmp_path: Path, start: Start, stop: Stop) -> None:
    whole = write_image(tmp_path / "grows.jpg", 9).read_bytes()
    watch = start(tmp_path / "out.csv")
    for size in range(0, len(whole), len(whole) // 8):
        (photos / "grows.jpg").write_bytes(whole[:size])
        watch.poll(stop)
    (photos / "grows.jpg").write_bytes(whole)
    poll(watch, stop)
    assert {row["path"]: row["error"] for row in rows(tmp_path / "out.csv")}[str(photos / "grows.jpg")] == ""
    assert len(rows(tmp_path / "out.csv")) == 4


def test_a_file_that_changes_while_it_is_read_is_read_again(
    photos: Path, tmp_path: Path, start: Start, stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wasteddp.inference import watch as module

    real = open_regular

    def opened(path: str) -> Any:
        monkeypatch.setattr(module, "open_regular", real)
        with Path(path).open("ab") as file:
            file.write(b"more")
        return real(path)

    watch = start(tmp_path / "out.csv")
    watch.poll(stop)
    monkeypatch.setattr(module, "open_regular", opened)
    watch.poll(stop)
    assert len(answered(tmp_path / "out.csv")) == 2
    poll(watch, stop)
    sizes = {Path(row["path"]): int(row["bytes"]) for row in rows(tmp_path / "out.csv")}
    assert sizes == {path: path.stat().st_size for path in photos.iterdir()}


def test_a_damaged_photo_is_tried_again_then_listed_and_answered_if_it_is_repaired(
    photos: Path, tmp_path: Path, start: Start, stop: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (photos / "1.jpg").read_bytes()
    (photos / "1.jpg").write_bytes(whole[:-100])
    (photos / "empty.jpg").touch()
    (photos / "link.jpg").symlink_to(photos / "absent.jpg")
    watch = start(tmp_path / "out.csv")
    poll(watch, stop, TRIES)
    assert sorted(answered(tmp_path / "out.csv")) == ["0.jpg", "2.jpg"]
    watch.poll(stop)
    errors = {Path(row["path"]).name: row["error"] for row in rows(tmp_path / "out.csv")}
    assert errors["1.jpg"].startswith("truncated")
    assert errors["empty.jpg"].startswith("empty")
    assert errors["link.jpg"] == "unreadable: No such file or directory"
    watch.finish()
    assert "2 classified, 3 unreadable" in capsys.readouterr().out
    watch = start(tmp_path / "out.csv")
    poll(watch, stop, TRIES + 1)
    assert len(rows(tmp_path / "out.csv")) == 5  # none twice
    (photos / "1.jpg").write_bytes(whole)
    poll(watch, stop)
    assert [row["error"] for row in rows(tmp_path / "out.csv") if row["path"].endswith("1.jpg")][1:] == [""]


def test_a_photo_that_could_not_be_read_is_answered_when_it_can_be(
    photos: Path, tmp_path: Path, start: Start, stop: Stop, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from wasteddp.inference import watch as module

    def away(path: str) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    paths = tmp_path / "out.csv", tmp_path / "out.jsonl"
    monkeypatch.setattr(module, "open_regular", away)
    watch = start(*paths)
    poll(watch, stop, 3 * TRIES)
    assert [row["error"] for row in rows(paths[0])] == ["unreadable: Stale file handle"] * 3
    watch.finish()
    printed = capsys.readouterr().out
    assert "0 classified, 3 unreadable" in printed
    assert "wait" not in printed
    monkeypatch.setattr(module, "open_regular", open_regular)
    poll(watch, stop, 1)
    for path in paths:
        assert [row["error"] or "" for row in rows(path)] == ["unreadable: Stale file handle"] * 3 + [""] * 3
    poll(start(*paths), stop)
    assert [len(rows(path)) for path in paths] == [6, 6]


def test_a_file_that_never_stays_the_same_is_reported(
    photos: Path, tmp_path: Path, start: Start, stop: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = start(tmp_path / "out.csv")
    for number in range(CHANGES + 5):
        os.utime(photos / "1.jpg", (number, number))
        watch.poll(stop)
    assert capsys.readouterr().err.count("1.jpg was another file at each of") == 1
    assert sorted(answered(tmp_path / "out.csv")) == ["0.jpg", "2.jpg"]


@pytest.mark.parametrize("how", ["unlink", "rename"])
def test_rows_are_not_written_into_a_file_that_is_no_longer_there(
    how: str, photos: Path, tmp_path: Path, start: Start, stop: Stop
) -> None:
    path = tmp_path / "out.csv"
    watch = start(path)
    poll(watch, stop)
    if how == "unlink":
        path.unlink()
    else:  # an editor, or logrotate
        path.rename(tmp_path / "old.csv")
        path.write_text("")
    write_image(photos / "3.jpg", 3)
    with pytest.raises(SourceError, match="was removed, renamed or replaced"):
        poll(watch, stop)


def test_a_damaged_row_in_the_middle_is_refused_and_no_row_is_removed(
    photos: Path, tmp_path: Path, start: Start, stop: Stop
) -> None:
    path, zeros = tmp_path / "out.csv", tmp_path / "out.jsonl"
    poll(start(path, zeros), stop)
    whole = path.read_bytes()
    at = whole.index(b"/1.jpg")
    for place in (at, at - 1):
        path.write_bytes(damaged := whole[:place] + b'"' + whole[place + 1 :])
        with pytest.raises(SourceError, match="something else than rows"):
            start(path)
        assert path.read_bytes() == damaged
    before = zeros.read_bytes()
    zeros.write_bytes(before + bytes(4000))  # a power cut
    start(zeros)
    assert zeros.read_bytes() == before


def test_a_renamed_or_touched_photo_is_not_answered_again_and_a_copy_is(
    photos: Path, tmp_path: Path, start: Start, stop: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = start(tmp_path / "out.csv")
    poll(watch, stop)
    (photos / "0.jpg").rename(photos / "a.jpg")
    os.utime(photos / "1.jpg", (1, 1))
    shutil.copy2(photos / "2.jpg", photos / "copy.jpg")
    poll(watch, stop)
    assert sorted(answered(tmp_path / "out.csv")) == ["0.jpg", "1.jpg", "2.jpg", "copy.jpg"]
    watch.finish()
    assert "2 photo(s) were answered before, under another name or time" in capsys.readouterr().out
    write_image(photos / "0.jpg", 20)  # the old name, another photo
    poll(start(tmp_path / "out.csv"), stop)
    assert sorted(answered(tmp_path / "out.csv")) == ["0.jpg", "0.jpg", "1.jpg", "2.jpg", "copy.jpg"]


def test_names_that_are_not_utf8_are_answered_once(photos: Path, tmp_path: Path, start: Start, stop: Stop) -> None:
    os.rename(photos / "0.jpg", os.fsencode(photos) + b"/\xff.jpg")  # noqa: PTH104, bytes
    paths = tmp_path / "out.csv", tmp_path / "out.jsonl"
    for _ in range(2):
        poll(start(*paths), stop)
        assert [len(rows(path)) for path in paths] == [3, 3]


def test_each_file_has_its_row_if_only_one_lost_some(photos: Path, tmp_path: Path, start: Start, stop: Stop) -> None:
    paths = tmp_path / "out.csv", tmp_path / "out.jsonl"
    poll(start(*paths), stop)
    paths[1].write_text(paths[1].read_text().splitlines()[0] + "\n")
    poll(start(*paths), stop)
    assert [sorted(answered(path)) for path in paths] == [["0.jpg", "1.jpg", "2.jpg"]] * 2


def test_what_disappears_is_reported_and_a_folder_that_cannot_be_listed_is_tried_again(
    photos: Path, tmp_path: Path, start: Start, stop: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = start(tmp_path / "out.csv")
    watch.poll(stop)
    photos.rename(tmp_path / "away")
    poll(watch, stop)
    assert capsys.readouterr().err.count("photos cannot be listed: No such file or directory") == 1
    (tmp_path / "away").rename(photos)
    (photos / "1.jpg").unlink()
    poll(watch, stop)
    assert "1.jpg disappeared before it was read" in capsys.readouterr().err
    assert sorted(answered(tmp_path / "out.csv")) == ["0.jpg", "2.jpg"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "path,label\n"),
        ("a.jsonl", "{}\n"),
        ("a.jsonl", '{"path": "a"}\n'),
        ("a.jsonl", "notes"),
        ("b.csv", "x"),
    ],
)
def test_a_file_with_something_else_is_refused_and_kept(name: str, content: str, tmp_path: Path, start: Start) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match="something else than rows of this command"):
        start(tmp_path / name)
    assert (tmp_path / name).read_text() == content


def test_two_processes_do_not_append_to_one_file(tmp_path: Path) -> None:
    with (
        closing(AnsweredCsv(tmp_path / "out.csv", CARD, decides=False)),
        pytest.raises(SourceError, match="another process"),
    ):
        AnsweredCsv(tmp_path / "out.csv", CARD, decides=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--watch", "{photos}"], "add --csv FILE or --json FILE.jsonl"),
        (["--watch", "{photos}", "--json", "a.json"], "name it a.jsonl"),
        (["--watch", "{photos}/absent", "--csv", "a.csv"], "there is no folder"),
        (["--watch", "{photos}", "b.jpg", "--csv", "a.csv"], "--watch takes no PATH"),
        (["b.jpg", "--every", "1"], "--every is only used with --watch"),
        (["--watch", "{photos}", "--every", "nan"], "not a number of seconds"),
        (["--watch", "{photos}", "--csv", "a.csv", "--workers", "2"], "no --workers"),
        ([], "required: PATH"),
        (["--csv", "a.csv"], "required: PATH"),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(bundle), *(word.format(photos=photos) for word in words)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_paths_may_follow_the_options(bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(bundle), "--device", "cpu", str(photos)]) == 0
    assert "3 classified" in capsys.readouterr().out


@pytest.mark.processes
def test_the_command_is_killed_started_again_and_ended_by_sigterm(bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, NARROW, "-m", "wasteddp.cli", "predict", str(bundle), "--watch", str(photos)]

    def started(number: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, "--json", str(out), "--every", "0.1", "--device", "cpu"], stdout=subprocess.PIPE, text=True
        )
        while not (out.exists() and out.read_bytes().count(b"\n") >= number):
            assert process.poll() is None
            time.sleep(0.05)
        return process

    process = started(3)
    process.kill()
    process.communicate()
    for seed in range(3, 5):
        write_image(photos / f"{seed}.jpg", seed)
    process = started(5)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "2 classified, 0 unreadable" in printed
    assert sorted(answered(out)) == [f"{seed}.jpg" for seed in range(5)]
