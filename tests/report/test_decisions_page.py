"""The page's section on bins says what decisions.json says, and marks what is no longer true."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported_run import metric_rows, sorted_items, write_decisions, write_metrics, write_reported_run
from small_run import CARD, random_weights, write_images, write_shards

from wasteddp import cli
from wasteddp.decisions.calibration import calibrate
from wasteddp.inference.bundle import read_card, replace_card, save_bundle
from wasteddp.inference.sorting import read_decisions
from wasteddp.report.decisions import _parts, sentences
from wasteddp.report.page import write_report

pytestmark = pytest.mark.usefixtures("reports")  # write reports in a real process


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reported_run(tmp_path_factory.mktemp("decisions"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def page_of(run: Path) -> str:
    return unescape(write_report([run]).read_text(encoding="utf-8")).replace("\u00a0", " ")


def test_the_sentences_are_those_of_the_record(run: Path) -> None:
    record = write_decisions(run)
    page = page_of(run)
    alone, hazard = 1000 * record["decided_alone"], record["hazard_decisions"] / 3
    person = sum(record["to_a_person"].values()) / 3
    found = re.search(
        r"the model sorts (\d+) alone, sends (\d+) to the bin of a hazard and passes (\d+) to a person", page
    )
    assert found is not None
    assert [int(one) for one in found.groups()] == pytest.approx([alone, hazard, person], abs=1)
    assert sum(int(one) for one in found.groups()) == 1000
    low, high = record["error_alone_interval"]
    assert f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %). At most 5 % was promised, with 95 %" in page
    one = record["hazards"]["paper"]
    ends = "{:.1f} to {:.1f}".format(*(100 * end for end in one["recall_interval"]))
    found = f"{100 * one['recall']:.1f} % of its {one['images']} images (95 % interval {ends} %) go into its bin"
    assert f"Hazard paper: {found}. At least 90 % was promised, with 90 % confidence: the promise held here." in page
    assert f"false alarms: {one['false_alarms']} other items" in page
    assert f"Area under the curve {record['area_under_risk_coverage']:.4f}" in page
    assert "By bin, by mass" in page
    assert "The probabilities are not calibrated" in page


@pytest.mark.parametrize(
    ("error", "ends", "verdict"),
    [
        (0.049, [0.04, 0.06], "the promise held here."),
        (0.051, [0.04, 0.06], "the promise was not kept here, perhaps by chance."),
        (0.09, [0.08, 0.1], "the promise was not kept here, and chance does not explain it; are these images"),
    ],
)
def test_a_promise_that_did_not_hold_is_named(error: float, ends: list[float], verdict: str, run: Path) -> None:
    record = write_decisions(run, error_alone=error, error_alone_interval=ends)
    page = page_of(run)
    assert verdict in page
    assert ("Choose the thresholds again on images like these." in page) == (error == 0.09)
    record["hazards"]["paper"] |= {"recall": 0.8, "recall_interval": [0.7, 0.85 if error == 0.09 else 0.95]}
    (run / "evaluations" / "test" / "decisions.json").write_text(json.dumps(record))
    page = page_of(run)
    assert ("Only 80.0 % of the hazard paper was found; the floor is 90 %" in page) == (error == 0.09)
    assert page.index("Hazard paper: ") < page.index("Of those that it sorts alone"), "what burns comes first"


def test_calibration_is_shown_without_decisions_and_with_them(run: Path) -> None:
    found = calibrate(*sorted_items(5, 400), split="val")
    replace_card(run / "model", replace(read_card(run / "model"), calibration=found.to_json()))
    shown = f"by {100 * found.ece_after[0]:.1f} points on average (95 % interval {100 * found.ece_after[1]:.1f} to"
    page = page_of(run)
    assert shown in page
    assert "Sorting into bins" not in page
    write_decisions(run, groups=12)
    page = page_of(run)
    assert page.count(shown) == 1
    assert page.count("expected calibration error") == 1
    assert "The intervals are over 12 groups (column site), by cluster bootstrap; fewer than 20 groups" in page
    assert "No error and no recall is promised: the thresholds were chosen on images of 12 groups (column site)" in page
    assert "was promised" not in page
    assert "The aim was at most 5 %: it was reached here." in page
    assert "aim, not a promise" in page


def test_decisions_and_evaluations_before_a_calibration_or_of_another_model_are_marked(run: Path) -> None:
    write_decisions(run)
    assert "calibrated after" not in page_of(run)
    card = read_card(run / "model")
    replace_card(run / "model", replace(card, temperature=2.0))
    page = page_of(run)
    assert "The model was calibrated after these decisions were measured" in page
    assert "The model was calibrated after this evaluation (temperature 1.000 then, 2.000 now)" in page
    metrics = run / "evaluations" / "test" / "metrics.json"
    metrics.write_text(
        metrics.read_text().replace('"options": {', '"options": {"by": "training", "precision": "fp32",')
    )
    page = page_of(run)
    assert "evaluated during training in fp32, before its probabilities were calibrated" in page
    assert "The model was calibrated after this evaluation" not in page
    save_bundle(run / "model", card, random_weights(seed=3))
    assert "These decisions are of an earlier model of the run" in page_of(run)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: raw.update(format_version=9), "another version wrote it"),
        (lambda raw: raw.update(error_alone=1.5), "error_alone: Input should be less than or equal to 1"),
        (lambda raw: raw.update(error_alone=float("nan")), "error_alone"),
        (lambda raw: raw.update(hazards={}), "its hazards are not those of its policy"),
        (lambda raw: raw.update(promised_error=None), "its promise is not that of its policy"),
        (lambda raw: raw["bins"][0].pop("purity"), "bins.0.purity: Field required"),
        (lambda raw: raw["reliability"]["bins"][9].update(mean_confidence=None), "its counts do not fit together"),
        (lambda raw: raw.clear(), "another version wrote it"),
    ],
)
def test_a_damaged_file_is_named_and_not_shown(change: Any, reason: str, run: Path) -> None:
    record = write_decisions(run)
    change(record)
    path = run / "evaluations" / "test" / "decisions.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=reason.partition(":")[0]):
        read_decisions(path)
    page = page_of(run)
    assert f"{path} is not shown: " in page
    assert reason in page
    assert "Sorting into bins" not in page


def test_names_of_bins_and_classes_cannot_write_the_page(run: Path) -> None:
    record = write_decisions(run)
    evil = "<script>alert(1)</script>"
    text = json.dumps(record).replace("round bin", evil).replace("Example city", evil).replace('"paper"', f'"{evil}"')
    (run / "evaluations" / "test" / "decisions.json").write_text(text)
    page = write_report([run]).read_text()
    assert evil not in page
    assert page.count("&lt;script&gt;alert(1)") >= 4


counts = st.integers(0, 5000)


@given(counts, counts, counts, counts)
def test_the_parts_of_a_thousand_are_whole_and_complete(right: int, wrong: int, hazard: int, person: int) -> None:
    total = right + wrong + hazard + person
    if not total:
        return
    alone = right + wrong
    record = {
        "items": total,
        "decided_alone": alone / total,
        "error_alone": wrong / alone if alone else None,
        "hazard_decisions": hazard,
        "to_a_person": {"cost": 0, "doubt": person},
    }
    parts = _parts(record)
    assert sum(part.items for part in parts) == 1000
    for part, exact in zip(parts, (right, wrong, hazard, person), strict=True):
        assert abs(part.items - 1000 * exact / total) < 1


def test_nothing_decided_alone_is_not_an_error_rate(run: Path) -> None:
    record = write_decisions(run)
    record |= {"decided_alone": 0.0, "error_alone": None, "error_alone_interval": None}
    record["hazards"]["paper"] |= {"recall": None, "images": 0, "recall_interval": None}
    said = " ".join(sentences(record, None))
    assert "wrong bin" not in said
    assert "there is no image of it here" in said


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with val and test, evaluated on both."""
    folder = tmp_path_factory.mktemp("again")
    images = write_images(folder / "images", {"train": (1, 1, 1), "val": (4, 4, 4), "test": (5, 3, 2)})
    write_shards(folder / "shards", images, dict(CARD.bins))
    run = folder / "run"
    save_bundle(run / "model", CARD, random_weights())
    (run / "settings.yaml").write_text(f"data:\n  shards: {folder / 'shards'}\n")
    write_metrics(run, metric_rows(40))
    (folder / "bins.yaml").write_text("name: Town\nclasses: {glass: a, metal: b, paper: b}\ncosts: {person: 0.4}\n")
    hazard = "name: Town\nclasses: {glass: a, metal: b, paper: {bin: c, hazard: true, recall: 0.3, confidence: 0.6}}\n"
    (folder / "hazard.yaml").write_text(hazard)
    assert cli.main(["evaluate", str(run)]) == 0
    return run


def test_other_bins_at_report_time_decide_as_evaluate_does(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bins = ["--bins", str(evaluated.parent / "bins.yaml")]
    out = tmp_path / "page.html"
    assert cli.main(["report", str(evaluated), *bins, "--out", str(out)]) == 0
    again = out.read_text()
    assert not (evaluated / "evaluations" / "test" / "decisions.json").exists(), "a report changes no evaluation"
    capsys.readouterr()
    assert cli.main(["evaluate", str(evaluated), *bins]) == 0
    assert "report.html: " in capsys.readouterr().out
    section = re.compile(r'<section class="decisions".*?</section>', re.DOTALL)
    assert section.findall(again) == section.findall((evaluated / "report.html").read_text())
    assert "Sorting into bins, on test: Town" in again


def test_thresholds_at_report_time_are_chosen_on_the_evaluation_split_or_the_named_one(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bins, out = ["--bins", str(evaluated.parent / "hazard.yaml")], str(tmp_path / "page.html")
    with pytest.raises(SystemExit):
        cli.main(["report", str(evaluated), *bins, "--out", out])
    assert "present model and calibration on val, where thresholds are chosen" in capsys.readouterr().err
    assert cli.main(["evaluate", str(evaluated), "--split", "val"]) == 0
    assert cli.main(["report", str(evaluated), *bins, "--out", out]) == 0
    page = Path(out).read_text().replace("\u00a0", " ")
    assert "At least 30 % was promised, with 60 % confidence" in page
    assert page.count('<section class="decisions"') == 2
    assert page.count("The thresholds were chosen on these same images") == 1
    with pytest.raises(SystemExit):
        cli.main(["report", str(evaluated), *bins, "--max-error", "0.01", "--out", out])
    assert "no threshold on 12 images keeps the error at 0.01" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["report", str(evaluated), "--max-error", "0.01"])
    assert "--max-error was given without --bins" in capsys.readouterr().err
    assert cli.main(["report", str(evaluated), *bins, "--choose-on", "test", "--out", out]) == 0
    same = [
        "The thresholds were chosen on these same images" in section
        for section in Path(out).read_text().replace("\u00a0", " ").split('<section class="decisions"')[1:]
    ]
    assert sorted(same) == [False, True]
    assert "on test" in Path(out).read_text()
    for words, found in (
        ([*bins, "--choose-on", "train"], "on train, where thresholds are chosen"),
        (["--choose-on", "test"], "--choose-on was given without --bins"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["report", str(evaluated), *words])
        assert found in capsys.readouterr().err
