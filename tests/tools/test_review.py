"""`wasteddp review` on a small run: what it finds, what it refuses, and the page without a browser."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import BINS, CARD, CLASSES, random_weights, write_image, write_images, write_shards

from wasteddp.cli import main
from wasteddp.errors import RunError
from wasteddp.files import CsvWriter
from wasteddp.inference.bundle import save_bundle
from wasteddp.inference.prediction_files import read_predictions
from wasteddp.report.page import Part, Picture, render_review
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.sharding.sources.layout import read_table
from wasteddp.tools.review import fit, review_run

TEST_IMAGES = (6, 5, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose set has one image twice in test, a little brighter and under another label."""
    folder = tmp_path_factory.mktemp("review")
    source = write_images(folder / "images", {"train": (2, 2, 2), "val": (2, 2, 2), "test": TEST_IMAGES})
    pixels = np.asarray(Image.open(source / "train/glass/0.jpg")).astype(int) + 3
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(source / "test/metal/same.jpg", quality=95)
    manifest = write_shards(folder / "shards", source, BINS)
    run = folder / "run"
    save_bundle(run / "model", replace(CARD, hashes=replace(CARD.hashes, manifest=manifest.sha256)), random_weights())
    (run / "settings.yaml").write_text(f"data:\n  shards: {folder / 'shards'}\n")
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    return folder


def table_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def rows_of(made: Path) -> list[dict[str, str]]:
    return table_of(made / "run/evaluations/test/predictions.csv")


def write_predictions(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = CsvWriter(file)
        writer.write(rows[0])
        for row in rows:
            writer.write(row.values())
    return path


def sure(row: dict[str, str], name: str) -> dict[str, str]:
    """Return the row of a model that is sure of a class."""
    return row | {f"p_{one}": "0.98" if one == name else "0.01" for one in CLASSES} | {"predicted": name}


def slots(page: str, part: str) -> list[dict[str, str]]:
    section = page.split(f'<section id="{part}"')[1].split("</section>")[0]
    return [
        {key: unescape(value) for key, value in re.findall(r'data-(\w+)="(.*?)"', figure.split(">")[0])}
        for figure in section.split("<figure")[1:]
    ]


def test_a_planted_error_and_a_conflicting_pair_are_on_the_page(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [sure(row, row["true"]) for row in rows_of(made)]
    rows[3] = sure(rows[3], "paper" if rows[3]["true"] == "glass" else "glass")
    given = write_predictions(tmp_path / "predictions.csv", rows)
    out = tmp_path / "page.html"
    assert main(["review", str(made / "run"), "--predictions", str(given), "--out", str(out)]) == 0
    page, printed = out.read_text(), capsys.readouterr().out
    (error,) = slots(page, "label-errors")
    assert (error["path"], error["label"], error["suggested"]) == (
        rows[3]["source"],
        rows[3]["true"],
        rows[3]["predicted"],
    )
    assert json.loads(error["top"])[0] == [rows[3]["predicted"], 0.98]
    pair = slots(page, "pairs")
    assert {one["path"] for one in pair} == {"train/glass/0.jpg", "test/metal/same.jpg"}
    assert {one["split"] for one in pair} == {"train", "test"}
    assert 'id="label-next"' not in page
    assert page.count('src="data:image/jpeg;base64,') == 3
    assert "probably wrong: 1." in printed
    assert "different labels: 1." in printed
    assert "3 pictures" in printed


def test_val_and_test_are_evaluated_unless_they_were(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wasteddp.tools import review

    evaluated = []
    real = review.evaluate_split

    def counted(classifier: object, shard_set: object, split: str, *rest: object) -> object:
        evaluated.append(split)
        return real(classifier, shard_set, split, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(review, "evaluate_split", counted)
    review_run(made / "run", out=tmp_path / "a.html", pairs=False, device="cpu")
    assert evaluated == ["val"]  # test was evaluated by `evaluate`
    printed = capsys.readouterr().out
    assert f"{6 + sum(TEST_IMAGES) + 1} predictions of val, test" in printed
    assert "held out" not in printed
    assert 'id="pairs"' not in (tmp_path / "a.html").read_text()

    run = shutil.copytree(made / "run", tmp_path / "run")
    metrics = run / "evaluations/test/metrics.json"
    record = json.loads(metrics.read_text())
    metrics.write_text(json.dumps(record | {"hashes": record["hashes"] | {"weights": "0" * 64}}))
    evaluated.clear()
    review_run(run, split=("test",), pairs=False, device="cpu")
    assert evaluated == ["test"]  # the saved one is of another model
    assert (run / "review.html").is_file()


def test_training_images_are_reviewed_with_a_warning(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    command = ["review", str(made / "run"), "--split", "train", "--no-pairs", "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    assert "warning: the probabilities of train are not held out" in capsys.readouterr().out
    assert "not held out" in out.read_text()


def test_images_without_a_label_are_sorted_by_doubt(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    for number in range(4):
        write_image(new / f"{number}.jpg", 900 + number)
    (new / "a\x1b[31mbroken.jpg").write_bytes(b"no image")
    table, out = tmp_path / "new.csv", tmp_path / "page.html"
    assert main(["predict", str(made / "run"), str(new), "--csv", str(table), "--device", "cpu"]) == 0
    pages = []
    for given in (new, table):
        review_run(made / "run", split=("test",), unlabelled=str(given), out=out, pairs=False, device="cpu")
        pages.append(slots(out.read_text(), "label-next"))
        assert "a\\x1b[31mbroken.jpg: unreadable" in capsys.readouterr().out
    assert pages[0] == pages[1]
    assert {one["path"] for one in pages[0]} == {str(new / f"{number}.jpg") for number in range(4)}
    assert {one["label"] for one in pages[0]} == {""}
    margins = [top[0][1] - top[1][1] for top in (json.loads(one["top"]) for one in pages[0])]
    assert margins == sorted(margins)

    rows = [row | {"unlike": str(number * 1000)} for number, row in enumerate(table_of(table))]
    write_predictions(table, rows)
    found = read_predictions(table, CLASSES)
    assert found.unlike is not None
    assert found.unlike.tolist() == [0.0, 1000.0, 2000.0, 3000.0]
    empty = write_predictions(tmp_path / "empty.csv", [row | {"unlike": ""} for row in rows])
    assert read_predictions(empty, CLASSES).unlike is None
    some = write_predictions(tmp_path / "some.csv", [rows[0] | {"unlike": ""}, *rows[1:]])
    with pytest.raises(RunError, match="`unlike` is empty in 1 of 4 rows"):
        read_predictions(some, CLASSES)
    review_run(made / "run", split=("test",), unlabelled=str(table), out=out, pairs=False, device="cpu")
    assert "how unlike the training images" in out.read_text()


def test_several_files_of_predictions_are_joined(made: Path, tmp_path: Path) -> None:
    rows = rows_of(made)
    halves = [write_predictions(tmp_path / f"{n}.csv", rows[n::2]) for n in range(2)]
    whole = write_predictions(tmp_path / "whole.csv", rows)
    pages = []
    for given in (halves, [whole]):
        review_run(made / "run", predictions=given, out=tmp_path / "page.html", pairs=False)
        pages.append(sorted(one["path"] for one in slots((tmp_path / "page.html").read_text(), "label-errors")))
    assert pages[0] == pages[1]


def test_predictions_that_do_not_fit_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(made)

    def refused(rows: list[dict[str, str]], *more: Path) -> str:
        given = write_predictions(tmp_path / "bad.csv", rows)
        with pytest.raises(RunError) as error:
            review_run(made / "run", predictions=[given, *more], out=tmp_path / "page.html", pairs=False)
        return str(error.value)

    other = "paper" if rows[0]["true"] != "paper" else "glass"
    assert f"was {other} when it was evaluated" in refused([rows[0] | {"true": other}])
    assert "several predictions" in refused(rows, tmp_path / "bad.csv")
    assert "none of the 2 predictions" in refused([row | {"source": "x" + row["source"]} for row in rows[:2]])
    assert "probabilities of glass, metal;" in refused(
        [{k: v for k, v in row.items() if k != "p_paper"} for row in rows]
    )
    assert "line 2: " in refused([rows[0] | {"p_glass": "nan"}])
    assert "line 3: " in refused([rows[0], rows[1] | {"p_glass": "7"}])
    assert "line 2: 'tin'" in refused([rows[0] | {"true": "tin"}])
    assert "--unlabelled" in refused([{k: v for k, v in row.items() if k != "true"} for row in rows])
    with pytest.raises(SystemExit) as error:
        main(["review", str(made / "run"), "--split", "tset", "--no-pairs"])
    assert error.value.code == 2
    assert "no samples in a split called 'tset'" in capsys.readouterr().err

    some = write_predictions(tmp_path / "some.csv", [*rows, rows[0] | {"source": "gone.jpg"}])
    review_run(made / "run", predictions=[some], out=tmp_path / "page.html", pairs=False)
    assert "1 prediction(s) are of images that the set does not have, such as gone.jpg" in capsys.readouterr().out


def test_the_limit_is_shared_and_what_a_part_leaves_goes_to_the_others() -> None:
    def part(cards: int, pictures: int = 1) -> Part:
        return Part("a", "a", "", [(Picture("p", "l", "s"),) * pictures] * cards, cards, "")

    def sizes(limit: int, *parts: Part) -> list[int]:
        return [len(one.cards) for one in fit(parts, limit)]

    assert sizes(400, part(50), part(3, 2), part(10)) == [50, 3, 10]
    assert sizes(90, part(500), part(100, 2), part(500)) == [30, 15, 30]
    assert sizes(90, part(500), part(3, 2), part(500)) == [42, 3, 42]
    assert sizes(90, part(500)) == [90]
    assert sizes(1, part(5), part(0, 2), part(5)) == [0, 0, 1]
    assert sum(sizes(7, part(5), part(9), part(9))) == 7


def test_names_are_escaped_on_the_page() -> None:
    evil = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    page = render_review(
        evil, evil, [evil], [Part("a", "a", evil, [(Picture(evil, evil, evil, ((evil, 0.5),)),)], 1, "")], [evil],
        store=evil,
    )  # fmt: skip
    assert "<img src=x" not in page
    assert "alert(1)</script>" not in page
    assert page.count("<script") == 2
    assert json.loads(slots(page, "a")[0]["top"]) == [[evil, 0.5]]


def test_a_class_that_looks_like_a_formula_is_read_back(tmp_path: Path) -> None:
    text = io.StringIO()
    writer = CsvWriter(text)
    writer.write(["source", "true", "predicted", "p_=a", "p_b"])
    writer.write(["=x.jpg", "=a", "b", 0.25, 0.75])
    (tmp_path / "p.csv").write_text(text.getvalue())
    found = read_predictions(tmp_path / "p.csv", ["b", "=a"])
    assert found.labels is not None
    assert (found.labels.tolist(), found.probabilities_NK.tolist()) == ([1], [[0.75, 0.25]])
    assert found.paths == ("./=x.jpg",)


def test_saved_labels_of_new_images_are_a_source(tmp_path: Path) -> None:
    """The page writes absolute paths, since a browser saves to a folder of its own."""
    paths = [write_image(tmp_path / "new" / f"{number}.jpg", number) for number in range(2)]
    table = tmp_path / "downloads" / "new-labels.csv"
    table.parent.mkdir()
    table.write_text(f"path,label\n{paths[0]},metal\n{paths[1]},paper\n")
    source, layout = read_table(table)
    assert [(image.file.path, image.class_name) for image in layout.images] == [
        (str(paths[0]), "metal"),
        (str(paths[1]), "paper"),
    ]
    assert [source.read(image.file.path) for image in layout.images] == [path.read_bytes() for path in paths]


def test_the_predictions_of_all_folds_review_train_and_val(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_images(tmp_path / "images", {"": (6, 6, 6)})
    manifest = make_shards(Job(source, tmp_path / "shards", Options(folds=2, fractions=(0.8, 0.0, 0.2))), workers=1)
    given = []
    for fold in range(2):
        run = tmp_path / f"fold-{fold}"
        save_bundle(
            run / "model", replace(CARD, hashes=replace(CARD.hashes, manifest=manifest.sha256)), random_weights()
        )
        (run / "settings.yaml").write_text(f"data:\n  shards: {tmp_path / 'shards'}\n  fold: {fold}\n")
        assert main(["evaluate", str(run), "--split", "val", "--device", "cpu"]) == 0
        given.append(run / "evaluations/val/predictions.csv")
    capsys.readouterr()
    review_run(tmp_path / "fold-0", predictions=given, pairs=False)
    num_test = manifest.split("test").num_samples
    assert f"{18 - num_test} predictions of val, train." in capsys.readouterr().out
