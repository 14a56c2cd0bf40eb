"""Prediction accepts files, folders and globs, skips unreadable files, and gives the same results as evaluation."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from narrow import __file__ as NARROW
from PIL import Image
from small_run import BINS, CARD, CLASSES, random_weights, write_image, write_run

from wasteddp.cli import main
from wasteddp.data.decoding.workers import Workers
from wasteddp.errors import SourceError, StorageError
from wasteddp.inference.bundle import save_bundle
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.predict import find_images, predict
from wasteddp.inference.prediction_files import Answer, Failure, json_record

WORKERS = Workers(2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only a bundle: no run, no settings, no shards."""
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(folder, CARD, random_weights())
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images in three folders, and files that must be skipped."""
    folder = tmp_path / "photos"
    for seed, name in enumerate(("b.jpg", "a.PNG", "deep/er/c.webp", "deep/d.bmp")):
        write_image(folder / name, seed)
    (folder / "notes.txt").write_text("not an image")
    (folder / "._b.jpg").write_bytes(b"what macOS adds")
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "b.jpg", folder / ".thumbnails" / "b.jpg")
    return folder


@pytest.mark.parametrize("workers", ["2 threads", "1 processes"])
def test_jpegs_with_faulty_markers_are_classified_and_counted(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    sound = (photos / "b.jpg").read_bytes()
    (photos / "c.jpg").write_bytes(sound[:20] + b"\0\0\0" + sound[20:])  # bytes before a marker
    (photos / "cut.jpg").write_bytes(sound[:20] + b"\0\0\0" + sound[20:-100])
    assert main(["predict", str(model), str(photos), "--device", "cpu", "--workers", workers]) == 0
    printed = capsys.readouterr().out
    assert "5 classified, 1 unreadable" in printed
    assert f"1 JPEG(s) have faulty markers and are classified, since all their pixels decode: {photos}/c.jpg" in printed


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def names(paths: Iterator[str], below: Path) -> list[str]:
    return [str(Path(path).relative_to(below)) for path in paths]


# --- which files ------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_images_sorted_and_then_those_of_its_folders(photos: Path) -> None:
    assert names(find_images([str(photos)]), photos) == ["a.PNG", "b.jpg", "deep/d.bmp", "deep/er/c.webp"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["b.jpg"]),
        ("*", ["a.PNG", "b.jpg"]),
        ("**/*.[bw]*", ["deep/d.bmp", "deep/er/c.webp"]),
        ("**", ["a.PNG", "b.jpg", "deep/d.bmp", "deep/er/c.webp"]),
    ],
)
def test_a_glob_gives_the_images_that_match(photos: Path, pattern: str, expected: list[str]) -> None:
    assert names(find_images([str(photos / pattern)]), photos) == expected


def test_a_file_that_is_named_itself_is_taken_whatever_its_name(photos: Path) -> None:
    shutil.copy(photos / "b.jpg", photos / "photo[1].jpg")
    shutil.copy(photos / "b.jpg", photos / ".hidden")
    wanted = [str(photos / name) for name in ("photo[1].jpg", ".hidden", "notes.txt", "b.jpg", "b.jpg")]
    assert list(find_images(wanted)) == wanted


def test_archives_and_tables_are_refused_alone_and_named_among_images(model: Path, photos: Path) -> None:
    for name in ("photos.ZIP", "photos.tar.gz", "photos.csv"):
        (photos / name).write_bytes(b"of any content")
        with pytest.raises(SourceError, match=r"is an? (archive|table), not an image"):
            find_images([str(photos / name)])
    paths = [str(photos / "photos.ZIP"), str(photos / "b.jpg"), str(photos / "photos.csv")]
    archive, _, table = predict(Classifier.load(model, device="cpu"), find_images(paths), WORKERS)
    assert archive == Failure(paths[0], "it is an archive, not an image")
    assert table == Failure(paths[2], "it is a table, not an image")


def test_a_link_to_a_folder_above_does_not_go_round_for_ever(photos: Path) -> None:
    (photos / "deep" / "up").symlink_to(photos)
    (photos / "deep" / "above").symlink_to(photos.parent)
    assert len(list(find_images([str(photos)]))) == 4


def test_a_link_to_another_folder_is_followed_once_and_reported(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    for folder in ("@eaDir", "."):
        (other / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "b.jpg", other / folder / "x.jpg")
    (photos / "deep" / "b-link").symlink_to(other)
    (photos / "a-link").symlink_to(other)
    assert names(find_images([str(photos)]), photos)[4:] == ["a-link/x.jpg"]
    output = capsys.readouterr().err
    assert "followed 1 link(s) to folders: " + str(photos / "a-link") in output
    assert f"did not follow 1 link(s) to folders that are read in another place or hold this one: {photos}" in output


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.jpg", "there is no .*absent.jpg"),
        ("x" * 300, "File name too long"),
        ("*.tiff", r"there is no image that matches .*\*\.tiff"),
        ("only-text", "there is no image in .*only-text"),
    ],
)
def test_a_path_with_nothing_under_it_is_refused_before_the_first_image(photos: Path, path: str, message: str) -> None:
    (photos / "only-text").mkdir()
    (photos / "only-text" / "notes.txt").write_text("text")
    with pytest.raises((SourceError, StorageError), match=message):
        find_images([str(photos), str(photos / path)])


# --- predictions ------------------------------------------------------------------------------------------------------


def test_prediction_and_evaluation_say_the_same_to_the_last_bit(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert main(["evaluate", str(run)]) == 0
    # the order and the batches differ from those of the shards
    assert main(["predict", str(run), str(tmp_path / "images"), "--csv", str(tmp_path / "out.csv")]) == 0
    predicted = {row["path"]: [row[f"p_{name}"] for name in CLASSES] for row in read_csv(tmp_path / "out.csv")}
    evaluated = read_csv(run / "evaluations" / "test" / "predictions.csv")
    assert len(evaluated) == 10
    for row in evaluated:
        assert [row[f"p_{name}"] for name in CLASSES] == predicted[str(tmp_path / "images" / row["source"])]
    assert len({tuple(row.values()) for row in evaluated}) == 10


def test_the_table_names_class_bin_probability_and_runners_up(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(model), str(photos), "--csv", str(photos / "out.csv")]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["class", "bin", "sure", "next", "file"]
    for line, row in zip(lines[:4], read_csv(photos / "out.csv"), strict=True):
        shares = sorted(((float(row[f"p_{name}"]), name) for name in CLASSES), reverse=True)
        (best, first), *others = shares
        assert line.startswith(f"{first:<5}  {BINS[first]:<10}  {100 * best:5.1f} %  ")
        positions = [line.index(f"{name} {100 * share:.1f} %", 20) for share, name in others]
        assert positions == sorted(positions)
        assert line.endswith(row["path"])
    assert lines[4:6] == ["", "4 classified, 0 unreadable"]
    assert lines[6].startswith("unlikeness: not known")
    assert lines[7:] == [f"written: {photos / 'out.csv'}"]


def test_top_1_prints_no_runner_up_and_a_model_without_bins_no_bin(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bundle(tmp_path / "model", replace(CARD, bins={}), random_weights())
    assert main(["predict", str(tmp_path / "model"), str(photos / "b.jpg"), "--top", "1"]) == 0
    head, line, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["class", "sure", "file"]
    assert len(line.split()) == 4
    assert line.split()[2] == "%"


def test_test_time_augmentation_is_named_in_the_json_and_answers_as_the_classifier_does(
    model: Path, photos: Path
) -> None:
    out = photos / "out.json"
    assert main(["predict", str(model), str(photos / "b.jpg"), "--tta", "flip", "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["tta"] == "flip"
    classifier = Classifier.load(model, tta="flip")
    expected = classifier.probabilities([classifier.view((photos / "b.jpg").read_bytes())])[0]
    assert list(content["predictions"][0]["probabilities"].values()) == [float(str(p)) for p in expected]
    assert main(["predict", str(model), str(photos / "b.jpg"), "--json", str(out)]) == 0
    plain = json.loads(out.read_text())
    assert plain["tta"] == "none"
    assert plain["predictions"][0]["probabilities"] != content["predictions"][0]["probabilities"]


def test_csv_and_json_hold_all_probabilities_and_agree(model: Path, photos: Path) -> None:
    out = [str(photos / "out.csv"), str(photos / "out.json")]
    assert main(["predict", str(model), str(photos), "--csv", out[0], "--json", out[1]]) == 0
    rows = read_csv(photos / "out.csv")
    content: dict[str, Any] = json.loads((photos / "out.json").read_text())
    assert content["model"]["classes"] == list(CLASSES)
    assert len(rows) == len(content["predictions"]) == 4
    for row, entry in zip(rows, content["predictions"], strict=True):
        assert row["path"] == entry["path"]
        assert row["class"] == entry["class"]
        assert row["bin"] == entry["bin"] == BINS[entry["class"]]
        assert {name: float(row[f"p_{name}"]) for name in CLASSES} == entry["probabilities"]
        assert float(row["probability"]) == entry["probability"] == max(entry["probabilities"].values())
        assert sum(entry["probabilities"].values()) == pytest.approx(1)
        assert row["error"] == ""
        assert entry["error"] is None


def test_the_same_pixels_get_the_same_answer_from_every_lossless_format(model: Path, tmp_path: Path) -> None:
    original = Image.open(write_image(tmp_path / "a.png", 5))
    for suffix in (".bmp", ".tiff", ".gif", ".webp"):
        if suffix == ".gif":  # 256 colours: compared with a palette PNG
            original.quantize(64).save(tmp_path / "a.gif")
            original.quantize(64).save(tmp_path / "palette.png")
        else:
            original.save(tmp_path / f"a{suffix}", lossless=True)
    original.close()
    classifier = Classifier.load(model, device="cpu")
    found = {
        Path(one.path).name: one.probabilities.tobytes()
        for one in predict(classifier, find_images([str(tmp_path)]), WORKERS)
        if isinstance(one, Answer)
    }
    assert found["a.png"] == found["a.bmp"] == found["a.tiff"] == found["a.webp"]
    assert found["a.gif"] == found["palette.png"]


# --- unreadable files -------------------------------------------------------------------------------------------------


def test_unreadable_files_are_listed_at_the_end_and_stop_nothing(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "cut.jpg").write_bytes((photos / "b.jpg").read_bytes()[:-200])
    (photos / "text.png").write_text("hello")
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    os.mkfifo(photos / "pipe.jpg")  # opening it would block forever
    out = [str(photos / "out.csv"), str(photos / "out.json")]
    assert main(["predict", str(model), str(photos), "--csv", out[0], "--json", out[1]]) == 0
    output = capsys.readouterr().out
    listed = output[output.index("4 could not be read:") :]
    for name, reason in (
        ("empty.jpg", "empty"),
        ("cut.jpg", "truncated"),
        ("text.png", "unreadable"),
        ("gone.jpg", "unreadable: No such file or directory"),
    ):
        assert f"{photos / name}: {reason}" in listed
    assert "4 classified, 4 unreadable" in listed
    rows = {Path(row["path"]).name: row for row in read_csv(photos / "out.csv")}
    entries = {Path(e["path"]).name: e for e in json.loads((photos / "out.json").read_text())["predictions"]}
    assert len(rows) == len(entries) == 8
    assert rows["empty.jpg"]["error"] == entries["empty.jpg"]["error"] == "empty: the file has 0 bytes"
    assert rows["empty.jpg"]["class"] == ""
    assert "class" not in entries["empty.jpg"]
    assert rows["b.jpg"]["error"] == ""
    assert rows["b.jpg"]["class"] in CLASSES


def test_unreadable_files_do_not_shift_the_answers_of_their_neighbours(model: Path, photos: Path) -> None:
    classifier = Classifier.load(model, device="cpu")
    good = [str(photos / name) for name in ("a.PNG", "b.jpg", "deep/d.bmp")]
    bad = str(photos / "notes.txt")
    alone = {path: next(predict(classifier, [path], WORKERS)) for path in good}
    mixed = [bad, good[0], bad, bad, good[1], *[bad] * 10, good[2], good[0]]
    found = list(predict(classifier, mixed, WORKERS))
    assert [one.path for one in found] == mixed
    for one in found:
        if one.path == bad:
            assert isinstance(one, Failure)
            assert one.reason.startswith("unreadable")
        else:
            before = alone[one.path]
            assert isinstance(one, Answer)
            assert isinstance(before, Answer)
            assert one.probabilities.tobytes() == before.probabilities.tobytes()


def test_exit_code_2_and_the_reasons_when_no_image_could_be_classified(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(model), str(photos / "notes.txt"), "--csv", str(photos / "out.csv")])
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert "notes.txt: unreadable" in output.out
    assert "none of the 1 files could be classified" in output.err
    assert read_csv(photos / "out.csv")[0]["error"].startswith("unreadable")


def test_of_many_failures_the_first_are_listed_and_the_rest_counted(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["predict", str(model), str(photos / "b.jpg"), *[str(photos / "notes.txt")] * 50])
    output = capsys.readouterr().out
    assert output.count("notes.txt: ") == 20
    assert "and 30 more; --csv FILE or --json FILE lists them all" in output


def test_a_folder_that_cannot_be_listed_is_one_of_the_failures(model: Path, photos: Path) -> None:
    found = list(predict(Classifier.load(model, device="cpu"), [str(photos)], WORKERS))
    assert found == [Failure(str(photos), "unreadable: this folder cannot be listed")]


# --- size and safety --------------------------------------------------------------------------------------------------


def test_an_endless_list_of_files_is_answered_as_it_comes(model: Path, photos: Path) -> None:
    asked = 0

    def endless() -> Iterator[str]:
        nonlocal asked
        for number in itertools.count(1):
            asked = number
            yield str(photos / "b.jpg")

    answers = predict(Classifier.load(model, device="cpu"), endless(), WORKERS)
    assert isinstance(next(answers), Answer)
    assert asked < 1000
    answers.close()


def test_a_file_that_was_begun_is_gone_after_an_error_and_the_old_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")

    def stopped_halfway() -> None:
        with json_record(path, CARD) as record:
            record.add(Answer("a.jpg", np.array([0.5, 0.25, 0.25], np.float32)))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stopped_halfway()
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    assert path.read_text() == "old"


def test_a_result_that_cannot_be_written_is_reported(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(model), str(photos), "--json", str(photos / "absent" / "out.json")])
    assert stopped.value.code == 2
    assert "writing: No such file or directory" in capsys.readouterr().err
    for more in ([], ["--watch", str(photos)]):
        with pytest.raises(SystemExit) as stopped:
            main(["predict", str(model), *(more or [str(photos)]), "--csv", "a.jsonl", "--json", "./a.jsonl"])
        assert stopped.value.code == 2
        assert "--csv and --json both name a.jsonl" in capsys.readouterr().err


def test_names_that_are_not_utf8_or_would_steer_the_terminal_come_through(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin = os.fsdecode(os.fsencode(photos) + b"/caf\xe9.jpg")
    colour = str(photos / "red\x1b[31m\n.jpg")
    for path in (latin, colour):
        shutil.copy(photos / "b.jpg", path)
    out = [str(photos / "out.csv"), str(photos / "out.json")]
    assert main(["predict", str(model), latin, colour, "--csv", out[0], "--json", out[1]]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "red\\x1b[31m\\n.jpg" in output
    assert "caf\\udce9.jpg" in output
    content = json.loads((photos / "out.json").read_text())
    assert [entry["path"] for entry in content["predictions"]] == [latin, colour]
    rows = read_csv(photos / "out.csv")  # UTF-8; a byte that is not is written as in JSON
    assert [row["path"] for row in rows] == [latin.replace("\udce9", "\\udce9"), colour]


@pytest.mark.processes
def test_the_command_runs_from_another_directory(model: Path, photos: Path) -> None:
    done = subprocess.run(
        [sys.executable, NARROW, "-m", "wasteddp.cli", "predict", model, "**/*.jpg"],
        cwd=photos,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 classified, 0 unreadable" in done.stdout


def test_help_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from wasteddp.cli import parser; parser().format_help()\n"
        "assert not {'torch', 'matplotlib', 'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
