"""A report is one small file that shows the data of the run's files and names what it could not show."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reported_run import charts_of, metric_rows, write_metrics, write_reported_run

from wasteddp.cli import main
from wasteddp.inference.bundle import _hash_of_card
from wasteddp.report.page import write_report
from wasteddp.report.run_record import bucket_means, kept_rows, log_ticks, ticks
from wasteddp.settings import known_keys, parse
from wasteddp.training import run_folder

pytestmark = pytest.mark.usefixtures("reports")  # write reports in a real process


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reported_run(tmp_path_factory.mktemp("reported"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` that a test may change."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def page_of(*runs: Path) -> str:
    return write_report(runs).read_text(encoding="utf-8")


def test_the_curves_are_the_rows(finished: Path) -> None:
    charts = charts_of(page_of(finished))
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for title, metrics in {
        "Loss": ["train/loss", "val/loss"],
        "Accuracy and recall": ["val/accuracy", "val/macro_recall", "val/macro_f1"],
        "Learning rate": ["lr"],
        "Gradient norm": ["train/grad_norm"],
        "Speed": ["train/images_per_s"],
        "Waiting for data": ["train/wait_fraction"],
    }.items():
        assert len(charts[title]["lines"]) == len(metrics)
        for line, metric in zip(charts[title]["lines"], metrics, strict=True):
            there = [row for row in rows if metric in row and (title != "Gradient norm" or row[metric] > 0)]
            assert line["steps"] == [row["step"] for row in there]
            assert line["values"] == pytest.approx([row[metric] for row in there], rel=1e-5)


def test_the_time_is_read_from_the_rows(finished: Path) -> None:
    page = page_of(finished)
    for what, value in (
        ("longest wait for a checkpoint", "12.5 ms"),
        ("longest write of a checkpoint, in the background", "1.5 s"),
    ):
        assert f'<th scope="row">{what}</th><td class="number">{value}</td>' in page
    assert not [title for title in charts_of(page) if "checkpoint" in title]


def test_the_figures_are_those_of_the_evaluation(finished: Path) -> None:
    page = page_of(finished)
    record = json.loads((finished / "evaluations" / "test" / "metrics.json").read_text())
    table = re.search(r'data-confusion="test".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert table is not None
    cells = [[int(cell or 0) for cell in re.findall(r"<td[^>]*>(\d*)</td>", row)] for row in table[1].split("</tr>")]
    assert cells[:3] == record["confusion"]
    assert f"{record['num_correct']} correct, {10 - record['num_correct']} wrong" in page
    assert f"{100 * record['accuracy_low']:.1f} to {100 * record['accuracy_high']:.1f}" in page
    assert page.count('src="data:image/jpeg;base64,') == record["num_samples"] - record["num_correct"] > 0
    for mistake in record["surest_mistakes"]:
        assert mistake["source"] in page
    for name, one in zip(record["classes"], record["per_class"], strict=True):
        if one["recall"] is not None:
            assert re.search(rf'<th scope="row">{name}.*?>{100 * one["recall"]:.1f} %<', page, re.DOTALL)


def test_a_macro_figure_names_its_classes_where_some_have_no_images(run: Path) -> None:
    assert "classes on test" not in page_of(run)
    path = run / "evaluations" / "test" / "metrics.json"
    record = json.loads(path.read_text())
    record["per_class"][2] |= {"support": 0, "recall": None}
    path.write_text(json.dumps(record))
    assert "of 2 of 3 classes on test" in page_of(run)


def test_what_the_page_is_made_of_stays_on_the_page(finished: Path) -> None:
    page = page_of(finished)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", page)
    assert set(re.findall(r'\b(?:src|href)="([^"]{5})', page)) == {"data:"}
    assert "default-src 'none'" in page


def test_lineage_settings_starts_and_state_are_reported(finished: Path) -> None:
    page = page_of(finished)
    card = json.loads((finished / "model" / "model.json").read_text())
    for digest in card["hashes"].values():
        assert digest in page
    assert "the same set is there now" in page
    assert re.search(r"<td>2</td><td>51 to 100</td>", page)
    assert "not finished" in page
    assert "5 of 0 epochs" not in page
    assert ">start 2</span>" in page


def test_settings_with_their_default_are_folded(run: Path) -> None:
    (run / "settings.yaml").write_text(parse("optimizer: {lr: 0.25}").to_yaml())
    page = page_of(run)
    shown, every = re.findall(r'<div class="settings">.*', page)[:2]
    assert re.findall("<dt>(.*?)</dt>", shown) == ["lr"]
    assert len(re.findall("<dt>(.*?)</dt>", every)) == len(known_keys())
    assert page.index(shown) < page.index(f"<details><summary>All {len(known_keys())} settings") < page.index(every)


def test_the_state_is_read_from_the_folder(run: Path) -> None:
    settings = (run / "settings.yaml").read_text()
    (run / "settings.yaml").write_text(settings + "train: {epochs: 5}\n")
    assert "all 5 epochs" in page_of(run)
    (run / "settings.yaml").write_text(settings + "train: {epochs: 9}\n")
    assert "5 of 9 epochs: still running, killed, or ended by an error" in page_of(run)
    (run / "RESUMABLE").touch()
    assert "by a signal, and saved" in page_of(run)


def test_what_cannot_be_shown_is_named(run: Path) -> None:
    shutil.rmtree(run / "evaluations")
    shutil.rmtree(run / "model")
    (run / "environment.json").unlink()
    (run / "settings.yaml").write_text("data: {shards: /nowhere}\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "tra')
    page = page_of(run)
    assert "There is no evaluation yet" in page
    assert "1 line(s) of metrics.jsonl are not rows" in page
    assert "there is no folder /nowhere" in page
    assert "environment.json cannot be read" in page
    (run / "settings.yaml").write_text("data: {shards: 's3://bucket/set'}\n")
    assert "the shard set is at a URL, and a report fetches nothing" in page_of(run)
    assert "has no model/model.json yet" in page


def test_images_of_another_shard_set_are_not_shown(run: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent / "shards", tmp_path / "shards")
    manifest = tmp_path / "shards" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("glass", "GLASS"))
    (run / "settings.yaml").write_text(f"data: {{shards: {tmp_path / 'shards'}}}\n")
    page = page_of(run)
    assert "data:image/jpeg" not in page
    assert "is no longer the shard set that was evaluated" in page
    assert "ANOTHER set is there now" in page


def test_figures_of_an_earlier_model_are_marked(run: Path) -> None:
    path = run / "evaluations" / "test" / "metrics.json"
    path.write_text(re.sub(r'"weights": "\w+"', '"weights": "00"', path.read_text()))
    assert "These metrics are of an earlier model" in page_of(run)


def test_names_cannot_write_the_page(run: Path) -> None:
    evil = "<script>alert(1)</script>"
    for path in (run / "evaluations" / "test" / "metrics.json", run / "model" / "model.json"):
        content = json.loads(path.read_text().replace('"glass"', json.dumps(evil)))
        if content.pop("sha256", None):
            content["sha256"] = _hash_of_card(content)
        path.write_text(json.dumps(content))
    rows = list(metric_rows(40))
    write_metrics(run, [{**row, f"val/recall/{evil}": row["epoch"]} for row in rows])
    page = page_of(run)
    assert evil not in page
    assert "&lt;script&gt;alert(1)" in page
    assert charts_of(page)["Recall by class"]["lines"][0]["name"].endswith("script>")


def test_rows_without_a_number_or_without_an_epoch_do_not_stop_it(run: Path) -> None:
    write_metrics(run, [{"step": step, "train/loss": [float("nan"), float("inf"), 2.5][step % 3]} for step in range(9)])
    line = charts_of(page_of(run))["Loss"]["lines"][0]
    assert line["steps"] == [2, 5, 8]
    write_metrics(run, [])
    assert "There is no" not in page_of(run)


def test_a_hundred_thousand_rows_make_a_small_page_that_keeps_their_extremes(run: Path) -> None:
    rows = list(metric_rows(100_000))
    rows[70_001]["train/loss"] = 40.0
    write_metrics(run, rows)
    page = page_of(run)
    assert len(page.encode()) < 2e6, "the aim is 10 MB; 0.2 MB was measured"
    loss = charts_of(page)["Loss"]["lines"][0]
    assert max(loss["values"]) == 40.0
    assert min(loss["values"]) == pytest.approx(min(row["train/loss"] for row in rows), rel=1e-5)
    assert (loss["steps"][0], loss["steps"][-1]) == (1, 100_000)
    assert "Of 100,000 rows, the smallest and the largest of each of 400 parts are drawn." in page
    by_step = {row["step"]: row["train/loss"] for row in rows}
    assert loss["values"] == pytest.approx([by_step[step] for step in loss["steps"]], rel=1e-5)


def test_runs_are_compared_line_by_line_and_setting_by_setting(
    run: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "settings.yaml").write_text((run / "settings.yaml").read_text() + "optimizer: {lr: 0.25}\n")
    out = tmp_path / "both.html"
    assert main(["report", str(finished), str(run), "--out", str(out)]) == 0
    assert "needs no network" in capsys.readouterr().out
    page = out.read_text()
    assert "Comparison of 2 runs" in page
    charts = charts_of(page)
    assert [line["name"] for line in charts["Val accuracy"]["lines"]] == ["run (1)", "run (2)"]
    assert re.search(r"<code>optimizer\.lr</code></th><td>–</td><td>0\.25</td>", page)
    assert "<code>run.out</code>" not in page
    assert not (finished / "comparison.html").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in ((tmp_path, "has no metrics.jsonl"), (tmp_path / "none", "there is no folder")):
        with pytest.raises(SystemExit) as stopped:
            main(["report", str(path)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", *[str(tmp_path)] * 9])
    assert "one chart can show at most 8" in capsys.readouterr().err


def test_a_report_that_fails_or_takes_too_long_is_reported_and_not_raised(run: Path, tmp_path: Path) -> None:
    (run / "report.html").unlink(missing_ok=True)
    (run / "report.html").mkdir()
    assert "report: not written, " in run_folder.write_report_within(60, run)
    (run / "report.html").rmdir()
    assert "not written within 0.01 s" in run_folder.write_report_within(0.01, run)
    assert run_folder.write_report_within(60, run) == f"report: {run}/report.html"


values = arrays(np.float64, st.integers(1, 300), elements=st.floats(-1e6, 1e6))


@given(values, st.integers(1, 20))
def test_thinned_rows_hold_the_ends_and_the_extremes_of_every_part(numbers: np.ndarray, buckets: int) -> None:
    kept = kept_rows(numbers, buckets)
    assert sorted(set(kept.tolist())) == kept.tolist()
    assert len(kept) <= 2 * buckets + 2
    assert {0, len(numbers) - 1} <= set(kept.tolist())
    assert numbers[kept].min() == numbers.min()
    assert numbers[kept].max() == numbers.max()


@given(values, st.integers(1, 20))
def test_means_of_parts_are_means_of_all_rows(numbers: np.ndarray, buckets: int) -> None:
    means = bucket_means(numbers, buckets)
    parts = np.array_split(np.zeros(len(numbers)), len(means))
    assert len(means) == min(buckets, len(numbers))
    assert means.min() >= numbers.min() - 1e-6
    assert means.max() <= numbers.max() + 1e-6
    if len({len(part) for part in parts}) == 1:
        assert means.mean() == pytest.approx(numbers.mean(), abs=1e-6)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 8))
def test_ticks_are_few_and_inside(low: float, span: float, most: int) -> None:
    found = ticks(low, low + span, most=most)
    assert len(found) <= most + 1
    assert all(low - 1e-6 * span <= one <= low + span * (1 + 1e-6) for one in found)
    assert len(set(found)) == len(found)


@given(st.floats(-6, 6), st.floats(0.05, 12))
def test_ticks_of_a_logarithmic_axis_are_few_and_inside(exponent: float, decades: float) -> None:
    low, high = 10**exponent, 10 ** (exponent + decades)
    found = log_ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low * 0.999 <= one <= high * 1.001 for one in found)


def test_an_evaluation_with_test_time_augmentation_reports_it(tmp_path: Path) -> None:
    run = write_reported_run(tmp_path)
    for options, said in (((), False), (("--tta", "flip"), True)):
        assert main(["evaluate", str(run), *options]) == 0
        assert main(["report", str(run)]) == 0
        assert ("mean over views of each image (--tta flip)" in (run / "report.html").read_text()) is said
